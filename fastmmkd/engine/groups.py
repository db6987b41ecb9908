"""Which seeds of a run are trained at once, and where what they share lies.

A seed alone keeps its resumable state in its own folder. Seeds that are trained together (`train.together`) keep it in
`together_<first seed>`, whose `group.json` names them; all else of a seed lies in its own folder in either case.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastmmkd.blocks import Config
from fastmmkd.distributed import barrier, rank
from fastmmkd.errors import UserError
from fastmmkd.files import make_directory, read_json, write_json
from fastmmkd.run_folder import (
    CHECKPOINTS_FOLDER,
    EVALUATION_FILE,
    GROUP_FILE,
    group_files,
    is_evaluated,
    seed_directory,
    together_directory,
)


@dataclass(frozen=True)
class SeedGroup:
    """Seeds that are trained at once: the S models of one module, in this order."""

    seeds: tuple[int, ...]
    directories: tuple[Path, ...]
    """Each seed's own."""
    directory: Path
    """Where the resumable state lies."""

    @property
    def name(self) -> str:
        """`"seed 1"`, `"seeds 1, 2"`."""
        return f"seed{'s' if len(self.seeds) > 1 else ''} {', '.join(map(str, self.seeds))}"

    @property
    def short_name(self) -> str:
        """The same for a progress bar: `"2 seeds"`."""
        return self.name if len(self.seeds) == 1 else f"{len(self.seeds)} seeds"

    def below(self, folder: str) -> SeedGroup:
        """The same seeds in a subfolder of each of their folders."""
        return SeedGroup(self.seeds, tuple(d / folder for d in self.directories), self.directory / folder)


def alone(seed: int, directory: Path) -> SeedGroup:
    """One seed, trained by itself."""
    return SeedGroup((seed,), (directory,), directory)


def together(seeds: tuple[int, ...], output: Path) -> SeedGroup:
    """Seeds of the run in `output`, trained at once."""
    directories = tuple(seed_directory(output, seed) for seed in seeds)
    return SeedGroup(seeds, directories, together_directory(output, seeds[0]))


def plan_groups(config: Config, output: Path) -> list[SeedGroup]:
    """The groups of a run in the order of training: those that were begun before as they are, then what is left.

    Raises:
        UserError: seeds that were begun together are to go on alone, or the reverse; a damaged `group.json`.
    """
    begun = [together(_read_seeds(file), output) for file in group_files(output)]
    if not config.train.together:
        for group in begun:
            if not all(map(is_evaluated, group.directories)):
                raise UserError(f"{group.directory}: {group.name} were begun together; expected --together to go on")
        return [alone(seed, seed_directory(output, seed)) for seed in config.train.seeds]
    order = {seed: i for i, seed in enumerate(config.train.seeds)}
    for group in begun:
        if not order.keys() >= set(group.seeds):
            raise UserError(f"{group.directory / GROUP_FILE}: {group.name}; expected some of the run's")
    begun.sort(key=lambda group: order[group.seeds[0]])
    known = {seed for group in begun for seed in group.seeds}
    left = [alone(seed, seed_directory(output, seed)) for seed in config.train.seeds if seed not in known]
    finished = [group for group in left if is_evaluated(group.directory)]
    fresh = [group for group in left if group not in finished]
    for group in fresh:
        if next(group.directory.rglob(CHECKPOINTS_FOLDER), None):
            raise UserError(f"{group.directory}: begun alone; expected --resume without --together until it ends")
    seeds = tuple(seed for group in fresh for seed in group.seeds)
    return [*finished, *begun, *([together(seeds, output)] if seeds else [])]


def reopen(groups: list[SeedGroup]) -> None:
    """Let finished seeds go on: they are to be evaluated anew, when they have trained for longer.

    Raises:
        UserError: one has nothing left to go on from.
    """
    for group in groups:
        if any(map(is_evaluated, group.directories)) and not (group.directory / CHECKPOINTS_FOLDER).exists():
            raise UserError(f"{group.directory}: no {CHECKPOINTS_FOLDER} to go on from; expected no more train.epochs")
    for group in groups:
        for directory in group.directories:
            (directory / EVALUATION_FILE).unlink(missing_ok=True)


def begin(group: SeedGroup) -> None:
    """Write down who belongs to a group; from now on it stays as it is."""
    if rank() == 0 and group.directory not in group.directories:
        write_json(make_directory(group.directory) / GROUP_FILE, {"version": 1, "seeds": list(group.seeds)})
    barrier()


def _read_seeds(file: Path) -> tuple[int, ...]:
    content = read_json(file, f"a group's {GROUP_FILE}")
    seeds = content.get("seeds") if isinstance(content, dict) else None
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) for seed in seeds):
        raise UserError(f"{file}: not a group's {GROUP_FILE}; expected the key seeds")
    return tuple(seeds)
