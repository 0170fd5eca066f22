"""A health check without curl: exit code 0 when every address answers with a 2xx."""

from __future__ import annotations

import sys
import urllib.request


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=4) as answer:  # raises for 4xx and 5xx
            return bool(200 <= answer.status < 300)
    except OSError as error:
        print(f"{url}: {error}", file=sys.stderr)
        return False


if __name__ == "__main__":
    sys.exit(any(not healthy(url) for url in sys.argv[1:]))
