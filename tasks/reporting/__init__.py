"""The leaderboard: rows from the metrics files, and the page made of them."""
