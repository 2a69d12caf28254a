"""Running a module's ``main()`` in a new interpreter, with the packages that are imported here."""

from __future__ import annotations

import os
import sys
from typing import List

import stubfs

# The standard library and site-packages come first, then what only this process looks at. Isolated (-I), and not by -m
# or a bare -c: those look in the current directory first, where a user's signal.py would be taken for Python's.
_CODE = """\
import sys
if {top!r} not in sys.path:
    sys.path.insert(0, {top!r})
sys.path += [place for place in {places!r} if place not in sys.path]
from {module} import main
sys.exit(main())
"""


def command(module: str, *arguments: str) -> List[str]:
    """The command line; ``arguments`` are sys.argv[1:] there. Environment variables of Python's are ignored."""
    top = os.path.dirname(os.path.dirname(os.path.abspath(stubfs.__file__)))
    places = [os.path.abspath(place) for place in sys.path]
    no_bytecode = ["-B"] * sys.dont_write_bytecode
    code = _CODE.format(top=top, places=places, module=module)
    return [sys.executable, "-I", *no_bytecode, "-c", code, *arguments]
