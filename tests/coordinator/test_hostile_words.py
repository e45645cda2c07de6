"""What devices say of themselves is text on the operator's terminal, whatever it looks like."""

from __future__ import annotations

import click
import pytest

from fleetune.coordinator import cliverbs, listing
from fleetune.v1 import control_pb2, fleet_pb2

WORDS = ["[/]", "[red]x", "[link=http://example.com]here", ":smile:", "<script>", "[bold"]


def test_words_that_look_like_markup_are_shown_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    console = cliverbs.console(click.Context(click.Command("devices")))
    device = control_pb2.DeviceView(
        name="oak", online=True, tags=WORDS, profile=fleet_pb2.Profile(board="[blink]Pi", accelerator_name="[/bold]")
    )
    with console.capture() as shown:
        console.print(listing.devices([device], now_unix_s=0.0, width=400))
    assert all(word in shown.get() for word in [*WORDS, "[blink]Pi", "[/bold]"])
