"""Files that are there whole or not at all."""

import os
import re
from collections.abc import Mapping
from pathlib import Path


def write_atomically(contents: Mapping[Path, bytes]) -> None:
    """Writes files so that each is, at any moment, either its old self or its new self, whole.

    All contents reach the disk under temporary names in the same folder before the first takes its place: where the
    disk is full or a folder cannot be written to, every old file stays as it was and nothing new is left behind.

    Raises:
        OSError: a file cannot be written; names the file.
    """
    waiting = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in contents}
    try:
        for path, content in contents.items():
            try:
                with open(waiting[path], "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from error
        for path, temporary in waiting.items():
            os.replace(temporary, path)
    finally:
        for temporary in waiting.values():
            temporary.unlink(missing_ok=True)
    for folder in {path.parent for path in contents}:
        _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    """Makes renames in a folder last through a power cut, where the system can (Windows cannot open a folder)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents, and checks that files can be written to it.

    Raises:
        ValueError: there is a file of that name.
        OSError: the folder cannot be made or written to; names it.
    """
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"folder must be a folder, {path} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe.{os.getpid()}.tmp"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


def clear_leftovers(folder: Path) -> None:
    """Deletes temporary files of `write_atomically` in a folder whose processes were killed before they took their
    place."""
    for file in folder.iterdir():
        name = re.fullmatch(r"\..+\.(\d+)\.tmp", file.name)
        if name and not _runs_elsewhere(int(name[1])):
            file.unlink(missing_ok=True)


def _runs_elsewhere(process: int) -> bool:
    """Whether there is another process of that number (on Windows, which has no harmless way to ask, there might)."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return process != os.getpid()
