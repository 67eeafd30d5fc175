"""The stage that measures what is promised of duplicates."""

from __future__ import annotations

import pytest

from puna.core.stage import Context, get_stage


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    stage = get_stage("duplicate_checks")
    context = Context("checks", tmp_path_factory.mktemp("checks"), {}, seed=5)
    return stage.function(context, stage.parameters(capacity=200_000, documents=400)).metrics


def test_bands_and_rows_are_the_papers(figures):
    shapes = [(figures[f"bands.{j}"], figures[f"rows.{j}"]) for j in (1.0, 0.9, 0.8, 0.7)]
    assert shapes == [(1, 128), (5, 25), (9, 13), (14, 9)]


def test_pairs_are_found_as_often_as_promised(figures):
    assert figures["found.deviation"] <= 0.05
    assert figures["found.0.7"] < figures["found.0.8"] < figures["found.0.9"]


def test_filters_clusters_and_copies_keep_their_promises(figures):
    assert figures["bloom.false_positives"] <= 0.0103
    assert figures["bloom.missed"] == 0
    assert (figures["clusters.survivors_least"], figures["clusters.survivors_most"]) == (1, 1)
    assert figures["clusters.whole_chains"] >= 0.95
    assert figures["clusters.strangers"] == 0
    assert (figures["copies.first_lost"], figures["copies.second_kept"]) == (0, 0)
