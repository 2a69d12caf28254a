"""Running a module's ``main()`` in a new interpreter, with the packages that are imported here."""

from __future__ import annotations

import os
import sys
from typing import List

import stubfs

# -c, as -m, puts the current directory in front, where a user's signal.py would be taken for Python's. What only this
# process looks at comes last, behind the standard library.
_CODE = """\
import sys
if not sys.path[0]:
    del sys.path[0]
if {top!r} not in sys.path:
    sys.path.insert(0, {top!r})
sys.path += [place for place in {places!r} if place not in sys.path]
from {module} import main
sys.exit(main())
"""


def command(module: str, *arguments: str) -> List[str]:
    """The command line; ``arguments`` are sys.argv[1:] there."""
    top = os.path.dirname(os.path.dirname(os.path.abspath(stubfs.__file__)))
    places = [os.path.abspath(place) for place in sys.path]
    code = _CODE.format(top=top, places=places, module=module)
    return [sys.executable, *["-I"] * sys.flags.isolated, "-c", code, *arguments]
