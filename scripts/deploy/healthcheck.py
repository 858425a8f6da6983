"""Does the server of this container answer, and are its engines well? Ends with 0 if so; needs nothing but Python."""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request


def main() -> int:
    port, key = os.environ.get("JAX_CLIENT_PORT", "8000"), os.environ.get("JAX_CLIENT_API_KEY", "")
    request = urllib.request.Request(f"http://127.0.0.1:{port}/healthz", headers={"X-API-Key": key})
    # Its own address is known to no proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=8) as answer:
            return 0 if answer.status == 200 else 1
    except urllib.error.HTTPError as error:
        # Of several keys in a file it knows none: a server that refuses is a server that answers.
        if error.code == 401 and not key:
            return 0
        print(f"status {error.code}: {error.read(2000).decode(errors='replace')}")
    except OSError as error:
        print(error)
    return 1


if __name__ == "__main__":
    sys.exit(main())
