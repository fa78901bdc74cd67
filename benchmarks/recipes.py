"""Whether the recipes of docs/libraries.md run as they stand, each in a process and a folder of its own.

make build/zoo                      # the libraries, beside .venv
python benchmarks/recipes.py [YOLO ...]
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "libraries.md"
BEFORE = (
    f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import peers; peers.make_importable(peers.ZOO)\n"
)
DETECTORS = "peers.run_detectors()\n"


def recipes() -> dict[str, str]:
    """Return the code of the page's sections by their headings."""
    return dict(re.findall(r"^## (.+?)\n.*?^```python\n(.*?)^```$", PAGE.read_text(), flags=re.M | re.S))


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run a recipe in an empty folder."""
    environment = os.environ | {"YOLO_OFFLINE": "True", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.py"
        path.write_text(BEFORE + (DETECTORS if "ultralytics" in code else "") + code)
        return subprocess.run([sys.executable, path], cwd=folder, capture_output=True, text=True, env=environment)


def main() -> None:
    """Run the recipes named, or all, and exit 1 if any fails."""
    failed = False
    for name, code in recipes().items():
        if sys.argv[1:] and not any(word.lower() in name.lower() for word in sys.argv[1:]):
            continue
        done = run(code)
        failed |= done.returncode != 0
        print(f"{name:32} {'runs' if done.returncode == 0 else done.stderr[-1500:]}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
