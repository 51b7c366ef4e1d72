"""Builds one page of metrics: samples by name, checked against the catalogue."""

from collections.abc import Iterator, Sequence
from typing import Final

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from tollbook.observability.catalogue import BY_NAME

_FAMILIES: Final = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}


def plain(meaning: str) -> str:
    """Return a meaning as help text, without backticks."""
    return meaning.replace("`", "")


class Page:
    """Collects samples; a name or a label that is not in the catalogue is a bug."""

    def __init__(self) -> None:
        self._samples: dict[str, dict[tuple[str, ...], float]] = {}
        self._histograms: dict[str, list[tuple[tuple[str, ...], Sequence[tuple[str, int]], float]]] = {}

    def add(self, name: str, value: float, **labels: str) -> None:
        """Add a value to a sample of a counter or a gauge."""
        series = self._samples.setdefault(name, {})
        key = self._key(name, labels)
        series[key] = series.get(key, 0) + float(value)

    def add_histogram(self, name: str, buckets: Sequence[tuple[str, int]], total: float, **labels: str) -> None:
        """Add a histogram: cumulative counts by upper bound, the last one `+Inf`, and the sum of observed values."""
        self._histograms.setdefault(name, []).append((self._key(name, labels), buckets, total))

    def families(self) -> Iterator[Metric]:
        """Yield the added metrics, in the order of the catalogue."""
        for name, metric in BY_NAME.items():
            help_text = plain(metric.meaning)
            if metric.kind == "histogram":
                family = HistogramMetricFamily(name, help_text, labels=metric.labels)
                for key, buckets, total in sorted(self._histograms.get(name, ())):
                    family.add_metric(key, buckets, total)
            else:
                family = _FAMILIES[metric.kind](name, help_text, labels=metric.labels)
                for key, value in sorted(self._samples.get(name, {}).items()):
                    family.add_metric(key, value)
            if family.samples:
                yield family

    def _key(self, name: str, labels: dict[str, str]) -> tuple[str, ...]:
        metric = BY_NAME[name]
        assert labels.keys() == set(metric.labels), f"{name} has the labels {metric.labels}"
        return tuple(labels[label] for label in metric.labels)
