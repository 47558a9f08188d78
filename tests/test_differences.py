"""What differs between two runs: one function for outputs, caches and results."""

from flexalign._differences import differences


def test_differences_are_found_at_any_depth_in_the_order_of_their_keys() -> None:
    before = {"lambda": 1.0, "data": "a", "training": {"seed": 0, "max_steps": 4}, "same": [1]}
    now = {"lambda": 2.0, "data": "a", "training": {"max_steps": 5}, "same": [1]}
    assert list(differences(before, now)) == [
        "lambda was 1.0, now 2.0",
        "training.max_steps was 4, now 5",
        "training.seed was 0, now null",
    ]
    assert list(differences(before, dict(before))) == []


def test_lists_are_told_whole_unless_they_hold_mappings() -> None:
    assert list(differences(["a", "b"], ["a", "z"], "pair")) == [
        'pair was ["a", "b"], now ["a", "z"]'
    ]
    form = "{key}: {before} there, {now} asked"
    assert list(differences({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}, form=form)) == [
        "a[1].b: 2 there, 3 asked"
    ]
    assert list(differences({"a": 1}, {"b": 1}, form=form)) == [
        "a: 1 there, null asked",
        "b: null there, 1 asked",
    ]
    assert list(differences({"a": [1]}, {"a": [1]}, form=form)) == []


def test_long_values_are_cut_and_named_things_go_by_their_names() -> None:
    tasks = [{"id": "one", "text": "long"}, {"id": "two", "text": "long"}]
    assert list(differences({"tasks": tasks}, {"tasks": tasks[:1]})) == [
        'tasks was ["one", "two"], now ["one"]'
    ]
    [told] = differences({"a": "x" * 200}, {"a": 1})
    assert told == f'a was "{"x" * 76}…, now 1'
