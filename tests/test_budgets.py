"""What a step sends over each axis of the mesh is what the strategies' pages say, within one in a hundred."""

import math

import budgets
import pytest


@pytest.mark.parametrize("of", budgets.BUDGETS, ids=str)
def test_a_step_sends_over_each_axis_what_the_page_says(of):
    step = budgets.compiled(of)
    model = budgets.MIXTURE if of.mixture else budgets.DECODER
    known = budgets.symbols_of(model, step.plan, budgets.ROWS, budgets.TOKENS, w=4, b=5)
    expected = budgets.allowed(of, step.plan.sizes, known, cpu=True)
    found = {key: step.sends.sent(*key[0], kind=key[1]) for key in expected}
    assert found == {key: pytest.approx(size, rel=0.01) for key, size in expected.items()}
    rest = step.sends.sent() - math.fsum(found.values())
    assert rest < 0.01 * step.sends.sent(), step.sends


@pytest.mark.parametrize("of", budgets.BUDGETS, ids=str)
def test_nothing_is_laid_out_anew_through_all_of_it_on_every_device(of):
    assert not budgets.compiled(of).warned
