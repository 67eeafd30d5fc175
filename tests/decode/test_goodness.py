"""The chi-square test: true laws pass, wrong ones fail, rare cells are pooled."""

from __future__ import annotations

import pytest
import torch

from puna.core.errors import PunaError
from puna.core.seeds import torch_generator
from puna.decode.goodness import chi_square


def draws(law: torch.Tensor, count: int, seed: int = 0) -> torch.Tensor:
    found = torch.multinomial(law, count, replacement=True, generator=torch_generator(seed, "draws"))
    return torch.bincount(found, minlength=len(law))


def test_p_values_of_the_true_law_are_uniform() -> None:
    law = torch.tensor([0.4, 0.3, 0.2, 0.07, 0.02, 0.01])
    found = sorted(chi_square(draws(law, 1000, seed), law)[1] for seed in range(200))
    # Kolmogorov-Smirnov at 1 in 1000: the largest distance from the diagonal.
    assert max(abs(value - (place + 0.5) / 200) for place, value in enumerate(found)) < 1.95 / 200**0.5


def test_a_wrong_law_is_found_out() -> None:
    law = torch.tensor([0.4, 0.3, 0.2, 0.1])
    assert chi_square(draws(law, 5000), torch.tensor([0.36, 0.34, 0.2, 0.1]))[1] < 1e-4
    assert chi_square(torch.tensor([50, 50, 1]), torch.tensor([0.5, 0.5, 0.0]))[1] == 0.0


def test_the_statistic_is_pearsons() -> None:
    statistic, value = chi_square(torch.tensor([30, 70]), torch.tensor([0.5, 0.5]))
    assert statistic == pytest.approx(16.0)
    assert value == pytest.approx(6.334e-05, rel=1e-3)


def test_rare_cells_are_one_cell() -> None:
    law = torch.tensor([0.5, 0.49, *[0.0001] * 100])
    counts = torch.tensor([5000, 4900, *[1] * 100])
    assert chi_square(counts, law)[1] > 0.9


def test_one_cell_tells_nothing_and_few_draws_are_refused() -> None:
    assert chi_square(torch.tensor([100, 0]), torch.tensor([1.0, 0.0])) == (0.0, 1.0)
    with pytest.raises(PunaError, match="too few draws"):
        chi_square(torch.tensor([3, 2]), torch.tensor([0.5, 0.5]))
