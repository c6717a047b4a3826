"""Files that are written whole or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


# Trainer leaves out of its uploads what starts with an underscore.
INCOMPLETE = "_incomplete"
OLD = "_old-"


@contextmanager
def written_whole(directory: str | os.PathLike) -> Iterator[Path]:
    """
    Yields an empty folder to write into; its entries appear in `directory` when the block ends without an error.

    Each entry (a file or a folder) is put in place by a rename, never half-written, not even by a power loss. After an
    error `directory` is as it was; what a killed run left behind is cleared away first.
    """
    directory = Path(directory)
    staging = directory / INCOMPLETE
    clear_staging(directory)
    staging.mkdir(parents=True)
    try:
        yield staging
        for entry in [entry for entry in sorted(staging.iterdir()) if not entry.name.startswith(OLD)]:
            put_in_place(entry, directory / entry.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def put_in_place(source: Path, target: Path) -> None:
    """Renames `source` to `target`; a file there is replaced at once, a folder moves aside, into the staging."""
    sync(source)
    if source.is_dir() and target.exists():
        os.replace(target, source.with_name(f"{OLD}{target.name}"))
    os.replace(source, target)
    _sync_entry(target.parent)


def sync(path: Path) -> None:
    """Waits until a file, or a folder with all that it holds, is on the disk and no longer in its caches."""
    for entry in (*path.rglob("*"), path):
        _sync_entry(entry)


def _sync_entry(path: Path) -> None:
    if os.name == "nt":  # which syncs only what is open for writing, and opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems know no fsync of a folder; a full disk or a broken one is an error.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def remove(folder: Path) -> None:
    """Deletes a folder, of which a kill meanwhile leaves nothing under its name."""
    staging = folder.parent / INCOMPLETE
    clear_staging(folder.parent)
    staging.mkdir()
    os.replace(folder, staging / folder.name)
    shutil.rmtree(staging)


def clear_staging(directory: Path) -> None:
    """Removes what a killed run left in the staging folder, and puts back a folder that it had just moved aside."""
    staging = directory / INCOMPLETE
    for old in staging.glob(f"{OLD}*"):
        target = directory / old.name.removeprefix(OLD)
        if not target.exists():
            os.replace(old, target)
    shutil.rmtree(staging, ignore_errors=True)
