"""What a user is told about a mistake."""

from puna.core.errors import PunaError, nearest, unknown_name


def test_the_message_holds_place_found_expected_and_what_to_do() -> None:
    error = PunaError("too long", where="a.txt:3", found=7, expected="at most 5", fix="cut it")
    assert str(error) == "a.txt:3: too long\n  found:    7\n  expected: at most 5\n  to do:    cut it"
    assert (error.message, error.where, error.found, error.expected, error.fix) == (
        "too long",
        "a.txt:3",
        7,
        "at most 5",
        "cut it",
    )


def test_only_what_is_known_is_told() -> None:
    assert str(PunaError("too long")) == "too long"
    assert str(PunaError("too long", found=0)) == "too long\n  found:    0"


def test_the_nearest_choice_is_suggested_and_a_strange_name_gets_none() -> None:
    assert nearest("trian", ["evaluate", "train"]) == "train"
    assert nearest("xyzzy", ["evaluate", "train"]) is None


def test_an_unknown_name_lists_the_choices_in_order() -> None:
    error = unknown_name("stage", "trian", ["train", "evaluate"], where="recipe.yaml:4")
    assert str(error) == (
        "recipe.yaml:4: unknown stage 'trian'\n  expected: one of evaluate, train\n"
        "  to do:    did you mean 'train'?"
    )
    assert "no stage is known" in str(unknown_name("stage", "train", []))
