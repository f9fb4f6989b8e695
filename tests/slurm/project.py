"""A project's root as a cluster's user has one, with the scripts and their logs apart from this checkout's."""

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]


def make_project(folder: Path, llm: str | None = None) -> Path:
    """`folder` with copies of the sbatch scripts and links to the rest; with `llm` that text is `python -m llm fit`."""
    (folder / "slurm" / "logs").mkdir(parents=True)
    for file in ROOT.glob("slurm/*.*"):
        shutil.copy(file, folder / "slurm")
    for name in ("llm", "evals", "small", "configs"):
        (folder / name).symlink_to(ROOT / name)
    if llm is not None:
        (folder / "llm").unlink()
        (folder / "llm").mkdir()
        (folder / "llm" / "__init__.py").touch()
        (folder / "llm" / "__main__.py").write_text(llm)
        for name in ("common", "runs"):
            (folder / "llm" / name).symlink_to(ROOT / "llm" / name)
    return folder
