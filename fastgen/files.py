"""Writing files atomically: a reader sees the old content or the new, never a part."""

import os
import re
from collections.abc import Mapping
from pathlib import Path


def write_atomically(contents: Mapping[Path, bytes]) -> None:
    """Writes files so that each holds, at any moment, its complete old or its complete new content.

    All contents reach the disk under temporary names in the same folder before the first file is replaced. If the disk
    is full or a folder cannot be written to, every old file stays and no temporary file is left.

    Raises:
        OSError: a file cannot be written; names the file.
    """
    temporaries = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in contents}
    try:
        for path, content in contents.items():
            try:
                with open(temporaries[path], "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from error
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
    for folder in {path.parent for path in contents}:
        _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    """Makes renames in a folder survive a power cut, on systems that can sync a folder (Windows cannot open one)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Creates a folder and its parents, and checks that files can be written to it.

    Raises:
        ValueError: the path or one of its parents is a file.
        OSError: the folder cannot be created or written to; names it.
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
    """Deletes the temporary files that killed processes left in a folder while in `write_atomically`."""
    for file in folder.iterdir():
        name = re.fullmatch(r"\..+\.(\d+)\.tmp", file.name)
        if name and not _runs_elsewhere(int(name[1])):
            file.unlink(missing_ok=True)


def _runs_elsewhere(process: int) -> bool:
    """Whether another process has this process id. On Windows, which has no harmless way to ask: True."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return process != os.getpid()
