"""Pipeline folders: a `model_index.json` and one folder per part, as diffusers lays them out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastldm.checks import with_article
from fastldm.diffusion.scheduler_config import class_of
from fastldm.diffusion.schedules import NoiseSchedule
from fastldm.errors import CheckpointError
from fastldm.io import atomic_folder, write_json
from fastldm.models.weights import read_json, resolve_folder

INDEX = "model_index.json"
SCHEDULER = "scheduler_config.json"
ASSETS = Path(__file__).parent.parent / "assets"


def shipped_models() -> list[str]:
    """Names of the models inside the package, each of which `from_pretrained` takes."""
    return sorted(file.parent.name for file in ASSETS.glob(f"*/{INDEX}"))


def find_pipeline(path: str | os.PathLike) -> Path:
    """The folder of a saved pipeline: a local one, else a shipped model of that name, else the hub's.

    Raises:
        CheckpointError: if there is none, or it is no pipeline's.
    """
    name, folder = os.fspath(path), Path(path)
    if not (folder / INDEX).is_file() and name in shipped_models():
        return ASSETS / name
    if not folder.exists() and folder.parent == Path("."):
        shipped = ", ".join(shipped_models()) or "none"
        raise CheckpointError(f"no folder {name!r}, and no shipped model of that name (shipped: {shipped})")
    if (folder / "config.json").is_file() and not (folder / INDEX).is_file():
        config = read_json(folder / "config.json")
        kind = config.get("_class_name") or (config.get("architectures") or ["model"])[0]
        raise CheckpointError(
            f"{folder} holds {with_article(str(kind))}, which is no pipeline; give a folder with {INDEX}"
        )
    return resolve_folder(path, None, INDEX)


def read_index(folder: Path) -> dict[str, Any]:
    """The `model_index.json` of a pipeline folder."""
    return read_json(folder / INDEX)


def part_class(index: Mapping[str, Any], part: str) -> str | None:
    """The class name that `index` gives for a part, or None if the pipeline has no such part."""
    entry = index.get(part)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 and entry[1] else None


def load_part(
    folder: Path,
    index: Mapping[str, Any],
    names: Sequence[str],
    classes: Mapping[str, Any],
    how: Mapping[str, Any] | None = None,
) -> Any:
    """The part under the first of `names` that the index has.

    Args:
        classes: those that the part may be of, by name.
        how: options of their `from_pretrained`.

    Raises:
        CheckpointError: if the pipeline has no such part, or it is of another class.
    """
    for name in names:
        found = part_class(index, name)
        if found in classes:
            return classes[found].from_pretrained(folder, subfolder=name, **(how or {}))
        if found is not None:
            accepted = " or ".join(classes)
            raise CheckpointError(f"{folder}/{name} is {with_article(found)}; fastldm reads {accepted} there")
    kind = index.get("_class_name", "pipeline")
    raise CheckpointError(
        f"{folder} ({with_article(kind)}) has no part {' or '.join(names)}; a latent diffusion folder holds "
        "vqvae, unet, scheduler, and bert with tokenizer or conditioner"
    )


@contextmanager
def writing_pipeline(path: str | os.PathLike, index: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a folder to save the parts into; on leaving it takes the place of `path` in one step.

    Files of an earlier save that are not written again (another variant's weights, a README) are kept.

    Raises:
        CheckpointError: if `path` is a file or a folder of something else, or cannot be written.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and ((path / INDEX).is_file() or not any(path.iterdir()))):
        raise CheckpointError(f"{path} exists and holds no pipeline; save to a new or an empty folder")
    try:
        with atomic_folder(path) as folder:
            if path.exists():
                shutil.copytree(path, folder, dirs_exist_ok=True)
            yield folder
            write_json(folder / INDEX, index)
    except OSError as error:
        raise CheckpointError(f"cannot save the pipeline to {path}: {error}") from error


def scheduler_config(
    schedule: NoiseSchedule, sampler: str, karras: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A schedule as diffusers' class of the sampler, and the fields that the class does not know."""
    config = schedule.to_config(class_of(sampler))
    read_back = NoiseSchedule.from_config(config).to_fields()
    lost = {key: value for key, value in schedule.to_fields().items() if value != read_back[key]}
    return {**config, **({"use_karras_sigmas": True} if karras else {})}, lost


def write_scheduler(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `scheduler_config.json` into a folder of its own."""
    folder.mkdir(exist_ok=True)
    write_json(folder / SCHEDULER, config)


def lost_fields(part: str) -> str:
    """The key of a `model_index.json` under which stands what a scheduler's class does not know."""
    return f"_{part.removesuffix('r')}"


def read_scheduler(
    folder: Path, index: Mapping[str, Any], part: str = "scheduler"
) -> tuple[NoiseSchedule, dict[str, Any]]:
    """The noise schedule of a pipeline, and the fields of its scheduler, which say how to walk it.

    Raises:
        CheckpointError: if there is none, or it cannot be read.
        ConfigError: if it is not offered.
    """
    config = read_json(folder / part / SCHEDULER)
    # diffusers makes the class that the index names of whatever config there is.
    if named := part_class(index, part):
        config = {**config, "_class_name": named}
    schedule = NoiseSchedule.from_config(config)
    # What that class does not know stands in the index.
    return NoiseSchedule.from_config({**schedule.to_fields(), **index.get(lost_fields(part), {})}), config
