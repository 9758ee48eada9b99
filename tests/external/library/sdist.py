"""The library's own test mixins: the `tests` folder of the source distribution of the transformers that is
installed."""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers


HERE = Path(__file__).parent
CACHE = HERE.parent / "build" / "library_tests"


def library_checkout() -> Path:
    """
    A folder laid out like the library's repository: `tests` from the source distribution, which is fetched once, and
    what the distribution lacks from `shims`. With it on `sys.path`, `tests` is the library's package.

    Raises:
        RuntimeError: what was fetched is of another version, or has what a shim stands for.
    """
    checkout = CACHE / transformers.__version__
    listing = checkout / "fetched.txt"
    if not listing.exists():
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text("\n".join(_fetch(transformers.__version__, checkout)) + "\n", encoding="utf-8")
    fetched = listing.read_text(encoding="utf-8").split()
    for name, shim in shims().items():
        if name in fetched:
            raise RuntimeError(
                f"The source distribution of transformers {transformers.__version__} has {name}: remove the shim."
            )
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(shim, checkout / name)
    return checkout


def shims() -> dict[str, Path]:
    """What stands for files that the distribution lacks, by their names in the library's repository."""
    files = [path for path in sorted((HERE / "shims").rglob("*")) if path.suffix in (".py", ".json")]
    return {path.relative_to(HERE / "shims").as_posix(): path for path in files}


def _fetch(version: str, checkout: Path) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        options = ["--no-binary", "transformers", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", folder, f"transformers=={version}"]
        subprocess.run(command, check=True, stdout=sys.stderr)
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            root = f"transformers-{version}"
            if f"{root}/PKG-INFO" not in tar.getnames():
                raise RuntimeError(f"Expected the source distribution of transformers {version}, got {archive.name}.")
            tar.extractall(
                folder, [member for member in tar if member.name.startswith(f"{root}/tests/")], filter="data"
            )
        shutil.copytree(Path(folder, root), checkout, dirs_exist_ok=True)
    return sorted(path.relative_to(checkout).as_posix() for path in checkout.rglob("*.py"))


if __name__ == "__main__":
    print(library_checkout())
