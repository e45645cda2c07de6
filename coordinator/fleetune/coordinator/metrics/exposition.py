"""Prometheus' text of a set of figures, by its own library, together with what that library knows of this process."""

from __future__ import annotations

import gzip
from collections.abc import Iterable

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from fleetune.coordinator.metrics import catalog
from fleetune.coordinator.metrics.figures import Figures
from fleetune.coordinator.metrics.pace import Paced, paced
from fleetune.coordinator.metrics.tally import Histogram

GZIP_LEVEL = 1
"""Of a text so repetitive more work saves little."""


class Exposition:
    """Made once: the collectors of the process read the machine's boot time and Python's version then."""

    def __init__(self) -> None:
        self._process = ProcessCollector(registry=None)
        self._platform = PlatformCollector(registry=None)

    def render(self, figures: Figures, accept: str, *, compress: bool) -> tuple[bytes, str]:
        """The text and its type, in the newest format that `accept` names."""
        encode, content_type = choose_encoder(accept)
        text = encode(_Families([*_families(figures), *self._process.collect(), *self._platform.collect()]))
        return (gzip.compress(text, GZIP_LEVEL, mtime=0) if compress else text), content_type


class _Families(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._collected = families

    def collect(self) -> Iterable[Metric]:
        return self._collected


def _families(figures: Figures) -> Iterable[Metric]:
    """One for each row of the catalog, also where there is no sample: whoever looks sees what there could be."""
    for row in catalog.CATALOG:
        if row.kind == "histogram":
            histogram = HistogramMetricFamily(row.name, row.help, labels=row.labels)
            for (name, labels), found in figures.histograms.items():
                if name == row.name:
                    histogram.add_metric(labels, _buckets(found), found.total)
            yield histogram
            continue
        family = CounterMetricFamily if row.kind == "counter" else GaugeMetricFamily
        values = family(row.name, row.help, labels=row.labels)
        for labels, value in paced(figures.values.get(row.name, {}).items()):
            values.add_metric(labels, value)
        values.samples = Paced(values.samples)
        yield values


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Cumulative, as the format has it."""
    bounds = (*catalog.DURATION_BOUNDS_S, float("inf"))
    below, found = 0, list[tuple[str, float]]()
    for bound, count in zip(bounds, histogram.counts, strict=True):
        below += count
        found.append(("+Inf" if bound == float("inf") else str(bound), below))
    return found
