"""Where the pipeline runs in production. Nothing in the code imports from here."""
