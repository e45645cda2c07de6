"""Writes the reference pages that are made from tables in the code: docs/jobs.md and docs/settings.md.

python docs/generate.py            # write them
python docs/generate.py --check    # exit code 1 if one is out of date
"""

from __future__ import annotations

import sys
from pathlib import Path

from fleetune import settings
from fleetune.agent import config as agent_config
from fleetune.coordinator import config as coordinator_config
from fleetune.coordinator import jobdocs

DOCS = Path(__file__).resolve().parent
NOTE = "<!-- Made by docs/generate.py from the tables in the code: change those, then run it. -->"


def pages() -> dict[str, str]:
    """File name in docs/ to its text."""
    return {"jobs.md": _jobs(), "settings.md": _settings()}


def main(arguments: list[str]) -> int:
    """0 where every page is current (or was written), 1 where `--check` finds one that is not."""
    stale = [name for name, text in pages().items() if not (DOCS / name).is_file() or (DOCS / name).read_text("utf-8") != text]
    if "--check" in arguments:
        for name in stale:
            print(f"docs/{name} is out of date: run python docs/generate.py")
        return 1 if stale else 0
    for name in stale:
        (DOCS / name).write_text(pages()[name], "utf-8")
        print(f"wrote docs/{name}")
    return 0


def _jobs() -> str:
    minimal = (DOCS.parent / "deploy/config/jobs/minimal.toml").read_text("utf-8")
    return f"""{NOTE}

# Job files

A job is one fine-tuning run, described by a TOML file. This is a whole one:

```toml
{minimal.rstrip()}
```

`fleetune validate job.toml` tells every mistake at once, each with its path, the value found, what is allowed and what to do.
`fleetune submit job.toml` runs it. Commented examples for each task lie in `deploy/config/jobs/`.

## Rows

A job names its *data*; where rows of that name lie, each device's own configuration says. Which columns a row needs depends on
the task:

| task.kind | columns |
| --- | --- |
| `text-classification` | `text`, `label`, and for sentence pairs `text_pair` |
| `causal-lm` | one of: `text`; `input` and `target`; `chat` |
| `seq2seq-lm` | `input` and `target` |

The settings in `[data]` hold the *names* of these columns, so that data need not be renamed: `text = "sentence1"`.
A label is a text of `task.labels` or an index into it. For `input` and `target` or `chat`, the loss covers the answers only
unless `mask_prompt = false`.

## What does not apply is a mistake

A setting that would have no effect (a `server_momentum` without `server_optimizer = "fedavgm"`, labels for a language model) is a
complaint and never ignored. One exception: with `method.name = "echo"`, the link test, the sections `[model]`, `[task]`, `[lora]`,
`[data]`, `[training]` and `[evaluation]` are checked as far as single values go and otherwise not used, so that any job file can be
tried as a link test by changing its method.

## All fields

Paths are absolute and mean the coordinator's machine.

{jobdocs.reference()}"""


def _settings() -> str:
    return f"""{NOTE}

# Settings of the daemons

Each daemon reads one TOML file. A variable of the environment goes before the file, an option of the command line before both.
Lists in the environment are separated by commas. Relative paths count from the file's folder. Whatever is wrong is told at once,
with its path, the value found, what is allowed and what to do; unknown settings are mistakes.

Commented files to start from: `deploy/config/agent.toml` and `deploy/config/coordinator.toml`.

## Agent

`fleetune-agent run --config FILE`; without the option `$FLEETUNE_AGENT_CONFIG`, then `~/.config/fleetune/agent.toml`, then
`/etc/fleetune/agent.toml`, then the defaults.

{settings.reference(agent_config.SETTINGS, agent_config.ENVIRONMENT_PREFIX)}
## Coordinator

`fleetune serve --config FILE`; without the option `$FLEETUNE_COORDINATOR_CONFIG`, then `~/.config/fleetune/coordinator.toml`, then
`/etc/fleetune/coordinator.toml`, then the defaults.

{settings.reference(coordinator_config.SETTINGS, coordinator_config.ENVIRONMENT_PREFIX)}"""


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
