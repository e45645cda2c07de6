"""A short child process: makes a key and its request, and says whether what came back for it fits.

`cryptography` takes more memory than the whole idle daemon may grow by, and is needed once in weeks. Two JSON lines in, two out, on the
pipes of the parent; the key is seen by nobody else.
"""

from __future__ import annotations

import base64
import json
import sys
from dataclasses import replace
from typing import cast

from fleetune.errors import FleetuneError
from fleetune.wire import keys
from fleetune.wire.identity import Facts, Identity

LINE_BYTES_MAX = 1 << 20


def main() -> int:
    """In: name; out: key and signing_request. In: certificate and roots; out: wrong, empty where all fits."""
    name = _asked("name")
    made = keys.make_request(name)
    _say(key=made.key.decode("ascii"), signing_request=base64.b64encode(made.signing_request).decode("ascii"))
    line = sys.stdin.readline(LINE_BYTES_MAX)
    if not line:  # the coordinator gave none
        return 0
    answer = cast("dict[str, str]", json.loads(line))
    facts = replace(_NOBODY, name=name)
    try:
        keys.check(Identity(facts, made.key, answer["certificate"].encode(), answer["roots"].encode()))
    except FleetuneError as error:
        _say(wrong=error.message)
    else:
        _say(wrong="")
    return 0


_NOBODY = Facts("agent", "", "", "", "", 0.0, 0.0)


def _asked(field: str) -> str:
    return str(cast("dict[str, object]", json.loads(sys.stdin.readline(LINE_BYTES_MAX)))[field])


def _say(**fields: str) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
