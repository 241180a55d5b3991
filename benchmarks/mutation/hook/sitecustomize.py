"""Install the import hook of mutation testing. Python runs this file at startup if its folder is in PYTHONPATH.

Child processes of tests inherit PYTHONPATH, so they have the fault too.
"""

import os
import sys
from pathlib import Path

if "MUTATION_LIST" in os.environ:
    import json

    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    from benchmarks.mutation import mutate

    sys.path.pop(0)
    listed = [mutate.Site(**x) for x in json.loads(Path(os.environ["MUTATION_LIST"]).read_text(encoding="utf-8"))]
    mutant, reached = os.environ.get("MUTATION_NUMBER"), os.environ.get("MUTATION_REACHED")
    mutate.install(listed, int(mutant) if mutant else None, Path(reached) if reached else None)
