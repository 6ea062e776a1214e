"""What ships beside the code: Snakefile, profiles, the default config, examples. A clone has them at its root, the wheel lays
them into `share/offline-opd` of the environment."""

from importlib import metadata
from pathlib import Path

from schemas.errors import OpdError


def shipped() -> Path:
    """The folder that has them. Raises OpdError where they were not installed with the code."""
    clone = Path(__file__).parents[2]
    if (clone / "Snakefile").is_file():
        return clone
    try:
        files = metadata.files("offline-opd") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "Snakefile" and (found := Path(str(file.locate()))).is_file():
            return found.parent.resolve()
    raise OpdError(f"no Snakefile beside {clone} nor in an installed offline-opd: run `pip install offline-opd`")
