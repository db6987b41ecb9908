"""`fastmmkd ablate`: a method, its ablations and its complete-training baselines, each trained on every seed."""

from __future__ import annotations

import argparse

from fastmmkd.blocks import Config
from fastmmkd.config import command_overrides, load_config
from fastmmkd.engine.suite import Member, slug, train_and_report
from fastmmkd.errors import UserError
from fastmmkd.evaluation.commands import papers_asked_for
from fastmmkd.methods import METHODS


def run_ablate(args: argparse.Namespace) -> int:
    """Train what is not trained yet (finished seeds are kept), then write the report."""
    common = command_overrides(args.set, args.data, args.seeds, args.together)
    full = load_config(args.config, common)
    method = METHODS[full.method]
    rows = method.ablations
    if not rows:
        with_rows = ", ".join(m.name for m in METHODS.values() if m.ablations)
        raise UserError(f"{args.config}: {method.title} has no ablations; expected a config of one of {with_rows}")
    slugs = {name: slug(name) for name in rows}
    for name in args.only or ():
        if slug(name) not in slugs.values():
            raise UserError(f"--only {name}: no such row; expected one of {', '.join(rows)}")
    wanted = set(map(slug, args.only or rows))
    folders = {name: args.out / slugs[name] for name in rows}
    first, members = folders[next(iter(rows))], []
    for name in rows:
        if slugs[name] in wanted:
            config = load_config(args.config, [*common, *rows[name]])
            shared = folders[name] != first and same_teacher(config, full)
            variant = None if folders[name] == first else name
            members.append(Member(name, config, folders[name], first if shared else None, variant))
    train_and_report(members, args.out, papers_asked_for(args))
    return 0


def same_teacher(config: Config, full: Config) -> bool:
    """Whether a row's teachers are those of the full method: it has some, and they are of the same architecture."""
    return config.teacher is not None and config.model == full.model
