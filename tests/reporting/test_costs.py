"""What codecs cost, in tables and over what they save."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lic_dist.evaluation.results import Figures
from lic_dist.models.complexity import NetCost
from lic_dist.reporting.charts import charts
from lic_dist.reporting.costs import costs, networks
from lic_dist.reporting.curves import Curve, curve_of
from lic_dist.reporting.document import sections
from lic_dist.reporting.findings import Findings
from lic_dist.reporting.styles import styles
from tests.points import measured

SMALL = {"g_a": NetCost(10.0, 5), "h_a": NetCost(1.0, 6), "g_s": NetCost(20.0, 7), "h_s": NetCost(3.0, 8)}
LARGE = {name: NetCost(4 * cost.kmac, 4 * cost.parameters) for name, cost in SMALL.items()}
PUBLISHED = Curve("published", (Figures(0.1, 30.0, None),))


def curve(name: str, factor: float, nets: dict[str, NetCost]) -> Curve:
    return curve_of(name, [replace(point, complexity=nets) for point in measured(name, factor)])


def test_costs_of_a_curve() -> None:
    rows = measured("sq", lambdas=1)[0].images
    taking = [replace(row, encode_seconds=float(n), encode_bytes=n * 1000) for n, row in enumerate(rows)]
    (found,) = costs([curve_of("x", [replace(measured("sq")[0], images=tuple(taking), complexity=SMALL)]), PUBLISHED])
    assert (found.encode_kmac, found.decode_kmac, found.parameters) == (14.0, 23.0, 26)
    assert (found.encode_seconds, found.decode_seconds, found.megapixels) == (1.0, 0.25, pytest.approx(0.393216))
    assert (found.encode_bytes, found.decode_bytes) == (2000, None)
    (old,) = costs([curve_of("x", measured("sq"))])  # of a file of an earlier version
    assert (old.encode_kmac, old.decode_kmac, old.parameters) == (None, None, None)


def test_the_table_names_every_network_once() -> None:
    curves = [curve("sq", 1, SMALL), curve("tcq8", 0.9, SMALL), curve("large", 0.8, LARGE)]
    assert [cost for _, cost in networks(curves)] == [SMALL, LARGE]
    (part,) = [one for one in sections(Findings.of(curves, curves[:1]), ()) if one.title == "Complexity"]
    whole, small, large = part.tables
    assert [cell.text for cell in whole.rows[2]][:3] == ["large", "56.0", "92.0"]
    assert [cell.text for cell in small.rows[0]] == ["g_a", "10.00", "5"]
    assert small.title == "Networks of q0.pth.tar, q1.pth.tar, q2.pth.tar, q3.pth.tar, q4.pth.tar" == large.title


def test_the_plot_of_rate_saved_over_what_decoding_costs() -> None:
    curves = [
        curve("sq", 1, SMALL),
        curve("tcq8", 0.9, SMALL),
        curve("large", 0.8, LARGE),
        curve_of("old", measured("sq", 0.7)),
    ]
    found = Findings.of(curves, curves[:1])
    (chart,) = [one for one in charts(found, styles(curves, "sq")) if one.name == "complexity"]
    (panel,) = chart.panels
    rows = panel.plot.layer[0].data
    assert list(zip(rows["curve"], rows["kmac"], strict=True)) == [("sq", 23.0), ("tcq8", 23.0), ("large", 92.0)]
    assert list(rows["mean"])[0] == 0 and list(rows["mean"])[1] == pytest.approx(100 * (0.9 + 0.81 + 0.729 - 3) / 3)
    without = [curve_of("sq", measured("sq")), curve_of("tcq8", measured("tcq8", 0.9))]
    assert all(one.name != "complexity" for one in charts(Findings.of(without, without[:1]), styles(without, "sq")))
