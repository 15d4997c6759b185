"""Anonymity of tables: published tables have their published measures, and what is required is reached."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedapp import config
from fedapp.errors import ConfigError, DataError
from fedapp.models import Logistic
from fedapp.tasks.anonymity import Anonymised, Anonymity, anonymise, required, total
from fedapp.tasks.equivalence import (
    Distance,
    Measures,
    Rows,
    Sensitive,
    covering,
    equal,
    hierarchical,
    leaves,
    measure,
    ordered,
    overall_of,
    tree_of,
)
from fedapp.tasks.mondrian import mondrian, outliers
from fedapp.tasks.partition import Iid, Natural
from fedapp.tasks.schema import Schema
from fedapp.tasks.tables import Csv


def measured(table: str, distance: Distance = equal) -> Measures:
    """The measures of a table as printed: a line's last word is sensitive, those before it make its class."""
    lines = [line.rsplit(maxsplit=1) for line in table.strip().splitlines()]
    values = sorted({line[1] for line in lines}, key=lambda word: (len(word), word))
    codes = np.array([values.index(line[1]) for line in lines])
    keys = [line[0] for line in lines]
    classes = [np.array([i for i, key in enumerate(keys) if key == one]) for one in dict.fromkeys(keys)]
    return measure(classes, [Sensitive(codes, len(values), distance)])


# Published tables

SWEENEY = """
Black 1965 m 0214* short-breath
Black 1965 m 0214* chest-pain
Black 1965 f 0213* hypertension
Black 1965 f 0213* hypertension
Black 1964 f 0213* obesity
Black 1964 f 0213* chest-pain
White 1964 m 0213* chest-pain
White 1964 m 0213* obesity
White 1964 m 0213* short-breath
White 1967 m 0213* chest-pain
White 1967 m 0213* chest-pain
"""

FOUR_ANONYMOUS = """
130** <30 heart
130** <30 heart
130** <30 viral
130** <30 viral
1485* >=40 cancer
1485* >=40 heart
1485* >=40 viral
1485* >=40 viral
130** 3* cancer
130** 3* cancer
130** 3* cancer
130** 3* cancer
"""

THREE_DIVERSE = """
1305* <=40 heart
1305* <=40 viral
1305* <=40 cancer
1305* <=40 cancer
1485* >40 cancer
1485* >40 heart
1485* >40 viral
1485* >40 viral
1306* <=40 heart
1306* <=40 viral
1306* <=40 cancer
1306* <=40 cancer
"""


def test_sweeneys_table_is_2_anonymous() -> None:
    """Sweeney 2002 (k-anonymity: a model for protecting privacy), figure 2: k=2."""
    found = measured(SWEENEY)
    assert found.k == 2
    assert found.distinct_l == 1  # the two women of 1965 have the same problem
    assert found.alpha == 1.0


def test_inpatients_are_4_anonymous_and_3_diverse() -> None:
    """Machanavajjhala et al. 2007 (l-diversity), tables II and III."""
    before, after = measured(FOUR_ANONYMOUS), measured(THREE_DIVERSE)
    assert (before.k, before.distinct_l, before.alpha) == (4, 1, 1.0)
    assert (after.k, after.distinct_l, after.alpha) == (4, 3, 0.5)
    assert after.entropy_l == pytest.approx(2**1.5)  # exp of 1.5 ln 2: values in shares 1/4, 1/4, 1/2


SALARIES = np.arange(3, 12)  # in thousands, one a row: Li et al. 2007 (t-closeness), table 3
ILLS = ["ulcer", "gastritis", "cancer", "gastritis", "flu", "bronchitis", "bronchitis", "pneumonia", "cancer"]
PAID = [3, 4, 5, 6, 11, 8, 7, 9, 10]
TABLE_4 = [[0, 1, 2], [3, 4, 5], [6, 7, 8]]  # its classes: 476** 2*, 4790* >=40, 476** 3*
TABLE_5 = [[0, 2, 7], [3, 4, 5], [1, 6, 8]]  # 4767*, 4790*, 4760*
FIGURE_1 = tree_of(
    "disease",
    {
        "respiratory": {
            "infection": ["flu", "pneumonia", "bronchitis"],
            "vascular": ["edema", "embolism"],
        },
        "digestive": {
            "stomach": ["ulcer", "cancer", "gastritis"],
            "colon": ["colitis", "colon-cancer"],
        },
    },
)


def as_rows(classes: Sequence[Sequence[int]]) -> list[Rows]:
    return [np.array(one) for one in classes]


def test_salaries_are_as_close_as_published() -> None:
    """Li et al. 2007: {3k,4k,5k} is 0.375 from all, {6k,8k,11k} 0.167; table 5 is 0.167-close."""
    salary = Sensitive(np.searchsorted(SALARIES, PAID), 9, ordered)
    t = [measure([rows], [salary], overall_of(np.arange(9), [salary])).t for rows in as_rows(TABLE_4)]
    assert t[:2] == [pytest.approx(0.375), pytest.approx(1 / 6)]
    assert measure(as_rows(TABLE_4), [salary]).t == pytest.approx(0.375)
    assert measure(as_rows(TABLE_5), [salary]).t == pytest.approx(1 / 6)


def test_diseases_are_as_close_as_published() -> None:
    """Li et al. 2007: the distances of figure 1, and 0.5 and 0.278 for the first classes of tables 4 and 5.

    Both numbers take each of the six diseases as equally frequent overall. By the frequencies of the table
    itself, which `measure` takes, table 5 is 8/27 = 0.296-close.
    """
    names = [*leaves(FIGURE_1)]
    distance = hierarchical(FIGURE_1, names)

    def between(p: Sequence[str], q: Sequence[str]) -> float:
        share = [np.array([list(one).count(name) / len(one) for name in names]) for one in (p, q)]
        return distance(share[0], share[1])

    assert between(["flu"], ["flu"]) == 0
    assert between(["flu"], ["bronchitis"]) == pytest.approx(1 / 3)
    assert between(["flu"], ["embolism"]) == pytest.approx(2 / 3)
    assert between(["flu"], ["cancer"]) == pytest.approx(1)
    overall = sorted({*ILLS})
    assert between(["ulcer", "gastritis", "cancer"], overall) == pytest.approx(0.5)
    assert between(["ulcer", "cancer", "pneumonia"], overall) == pytest.approx(0.278, abs=5e-4)
    disease = Sensitive(np.array([names.index(one) for one in ILLS]), len(names), distance)
    assert measure(as_rows(TABLE_5), [disease]).t == pytest.approx(8 / 27)
    assert measure(as_rows(TABLE_5), [disease]).distinct_l == 3
    alike = Sensitive(disease.codes, len(names), equal)
    assert measure(as_rows(TABLE_5), [alike]).t == pytest.approx(5 / 9)


HOSPITAL = """age gender city disease
29 Female Tamil_Nadu cancer
24 Male Tamil_Nadu cancer
23 Male Tamil_Nadu cancer
22 Male Tamil_Nadu cancer
24 Female Kerala viral
28 Female Tamil_Nadu tb
27 Male Karnataka none
24 Female Kerala heart
23 Male Karnataka tb
19 Male Kerala cancer
29 Male Karnataka heart
17 Male Kerala heart
19 Male Kerala viral"""


def test_the_hospital_has_the_measures_that_anjana_reaches() -> None:
    """anjana's examples/hospital.py: ages by tens are 2-anonymous; with cities hidden, 2-diverse as well."""
    rows = [line.split() for line in HOSPITAL.splitlines()[1:]]
    assert measured("\n".join(map(" ".join, rows))).k == 1
    by_tens = measured("\n".join(f"{age[0]}* {gender} {city} {ill}" for age, gender, city, ill in rows))
    assert (by_tens.k, by_tens.distinct_l) == (2, 1)
    hidden = measured("\n".join(f"{age[0]}* {gender} {ill}" for age, gender, _, ill in rows))
    assert hidden.k >= 2
    assert hidden.distinct_l >= 2


PUPILS = """34 82 60 57 56
76 42 75 30 30 72 55
73 40 39 58 76
62 80 77 67 95 87 60
69 45 91 79 57 59
87 63 83 83 72
82 93 65 82 70 53
52 88 76 53 58 68 64 83
77 89 93 73 89
62 61 79 66 52 87
70 59 63 68 45
71 59 53 72 94
56 72 30 73 37 52 71
78 64 36 38 51
58 64 65 50 40
32 69 74 80 50 34 54 59 33
85 91 48 86 71
89 79 53 83 61 51 60 95
47 50 66 74 84
72 65 80 46 48
60 51 87 48 87 95 64 84 53 52 53
89 91 58 64 68
61 46 85 48 89 56
51 90 47 79 45 75 79
57 67 57 81 91 57"""


def test_pupils_have_the_measures_that_pycanon_publishes() -> None:
    """pycanon's data/processed/StudentsMath_Score_k5.csv, and what its tests/test_reports.py expects of it.

    A class a line, by teacher, gender, ethnicity, lunch and school; its scores are sensitive, and numbers.
    """
    classes = enumerate(PUPILS.splitlines())
    found = measured("\n".join(f"{i} {score}" for i, line in classes for score in line.split()), ordered)
    assert (found.k, found.distinct_l, found.alpha) == (5, 4, 0.5)
    assert int(found.entropy_l) == 3  # which pycanon rounds down
    assert found.t == pytest.approx(0.31023287057769827, rel=1e-12)


PATIENTS = Schema("disease", ("aids", "arm", "bronchitis", "flu", "hepatitis", "nail"),
                  (("sex", ("female", "male")), ("age", None), ("zip", None)))  # fmt: skip
PATIENT_ROWS = np.array(
    [[0, 1, 25, 53711], [1, 0, 25, 53712], [0, 1, 26, 53711], [0, 1, 27, 53710], [1, 0, 27, 53712],
     [0, 1, 28, 53711]], dtype=np.float32
)  # fmt: skip
PATIENT_ILLS = np.array([3, 4, 2, 1, 0, 5])


def test_mondrian_makes_the_published_partition() -> None:
    """LeFevre et al. 2006, figures 1 and 3: patients, 2-anonymous by cuts in sex and then in age."""
    rules = Anonymity(quasi_identifiers=["sex", "age", "zip"], k=2)
    found = anonymise(PATIENT_ROWS, PATIENT_ILLS, PATIENTS, rules, "patients")
    ages = [
        (found.rows[rows].tolist(), np.ptp(PATIENT_ROWS[rows], axis=0).tolist()) for rows in found.classes
    ]
    assert sorted(ages) == [
        ([0, 2], [0, 0, 1, 0]),  # [25-26] male 53711
        ([1, 4], [0, 0, 2, 0]),  # [25-27] female 53712
        ([3, 5], [0, 0, 1, 1]),  # [27-28] male [53710-53711]
    ]
    assert found.x[[0, 2]].tolist() == [[0, 1, 25.5, 53711]] * 2
    assert found.x[[3, 5]].tolist() == [[0, 1, 27.5, 53710.5]] * 2
    assert found.cost.discernibility == 12  # three classes of two: 3 * 2**2, Bayardo and Agrawal 2005
    assert found.cost.loss == pytest.approx((0 + 1 / 3 + 0 + 0 + 2 / 3 + 0 + 0 + 1 / 3 + 1 / 2) / 9)


# Measures


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=40), st.lists(st.integers(0, 5), min_size=1, max_size=40)
)
def test_distances_are_distances(first: list[int], second: list[int]) -> None:
    p, q = (np.bincount(one, minlength=6) / len(one) for one in (first, second))
    tree = tree_of("x", [["0", "1"], ["2", ["3", "4"]], "5"])
    for distance in (equal, ordered, hierarchical(tree, "012345")):
        assert distance(p, p) == 0
        assert distance(p, q) == pytest.approx(distance(q, p))
        assert -1e-12 <= distance(p, q) <= 1 + 1e-12
    assert hierarchical(tree_of("x", [*"012345"]), "012345")(p, q) == pytest.approx(equal(p, q))


@given(st.lists(st.integers(0, 3), min_size=4, max_size=60), st.integers(1, 59))
def test_merging_classes_never_makes_measures_worse(codes: list[int], cut: int) -> None:
    """Why classes whose shared values happen to be equal do no harm."""
    column = Sensitive(np.array(codes), 4, ordered)
    cuts = sorted([cut % len(codes), len(codes) // 2])
    thirds = [rows for rows in np.array_split(np.arange(len(codes)), cuts) if len(rows)]
    apart = measure(thirds, [column])
    joined = measure([np.concatenate(thirds[:2]), *thirds[2:]], [column])
    assert joined.k >= apart.k
    assert joined.distinct_l >= apart.distinct_l
    assert joined.entropy_l >= apart.entropy_l - 1e-9
    assert joined.alpha <= apart.alpha + 1e-9
    assert joined.t <= apart.t + 1e-9
    assert apart.distinct_l >= apart.entropy_l - 1e-9 >= 1 / apart.alpha - 2e-9


def test_the_worst_sensitive_column_counts() -> None:
    same, all_different = Sensitive(np.zeros(4, int), 1, equal), Sensitive(np.arange(4), 4, equal)
    found = measure([np.arange(4)], [all_different, same])
    assert (found.distinct_l, found.alpha, found.t) == (1, 1.0, 0.0)


# What is required is reached

CITIES = ("lyon", "nice", "paris", "rome", "turin")
SCHEMA = Schema(
    "ill", ("no", "yes", "maybe"), (("age", None), ("city", CITIES), ("dose", None), ("pay", None))
)
HIERARCHY = {"city": {"france": ["lyon", "nice", "paris"], "italy": ["rome", "turin"]}}


def table_of(seed: int, rows: int) -> tuple[Any, Rows]:
    rng = np.random.default_rng(seed)
    pay = rng.lognormal(8, 1, rows)
    blocks = [rng.integers(18, 90, (rows, 1)), np.eye(5)[rng.integers(0, 5, rows)], rng.random((rows, 1)),
              pay[:, None]]  # fmt: skip
    return np.concatenate(blocks, axis=1).astype(np.float32), rng.choice(3, rows, p=[0.5, 0.3, 0.2])


def check_it_holds(x: Any, y: Rows, rules: Anonymity, found: Anonymised) -> None:
    """From what is shared alone: rows with equal quasi-identifiers are a class."""
    at = {"age": [0], "city": [1, 2, 3, 4, 5], "dose": [6], "pay": [7]}
    quasi = [i for name in rules.quasi_identifiers for i in at[name]]
    _, ids = np.unique(found.x[:, quasi], axis=0, return_inverse=True)
    classes = [np.flatnonzero(ids == one) for one in range(ids.max() + 1)]
    label = Sensitive(y[found.rows], 3, equal)
    dose, ranks = np.unique(found.x[:, 6], return_inverse=True)
    columns = {"ill": label, "dose": Sensitive(ranks, len(dose), ordered)}
    reached = measure(classes, [columns[name] for name in rules.sensitive or ("ill",)])
    assert rules.met_by(reached)
    assert found.cost.measures is not None
    assert rules.met_by(found.cost.measures)
    assert (np.diff(found.rows) > 0).all()
    assert len(x) - len(found.rows) == found.cost.suppressed <= rules.suppress * len(x)
    others = [i for i in range(8) if i not in quasi]
    assert np.array_equal(found.x[:, others], x[found.rows][:, others])  # rows stay with their labels
    assert sorted(np.concatenate(found.classes).tolist()) == list(range(len(found.x)))
    for rows in found.classes:
        assert (found.x[rows][:, quasi] == found.x[rows[0], quasi]).all()
        if "age" in rules.quasi_identifiers:
            assert found.x[rows[0], 0] == pytest.approx(x[found.rows[rows], 0].mean(), rel=1e-6)
    assert found.x[:, 1:6].sum(axis=1) == pytest.approx(1, abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(30, 150),
    quasi=st.sampled_from([["age"], ["city", "age"], ["pay", "age", "city"]]),
    sensitive=st.sampled_from([None, ["dose"], ["ill", "dose"]]),
    k=st.integers(2, 12),
    distinct_l=st.sampled_from([None, 2]),
    entropy_l=st.sampled_from([None, 1.5]),
    alpha=st.sampled_from([None, 0.55, 0.8]),
    t=st.sampled_from([None, 0.15, 0.4]),
    suppress=st.sampled_from([0.0, 0.05, 0.3]),
    hierarchies=st.sampled_from([None, HIERARCHY]),
)
def test_what_is_required_is_reached(seed: int, rows: int, **required_of: Any) -> None:
    x, y = table_of(seed, rows)
    quasi = required_of.pop("quasi")
    if "city" not in quasi:
        required_of["hierarchies"] = None
    rules = Anonymity(quasi_identifiers=quasi, **required_of)
    kept = x.copy(), y.copy()
    try:
        found = anonymise(x, y, SCHEMA, rules, "table")
    except DataError:
        assert rules.sensitive != ("dose",)  # all different: it can always be reached
        return
    assert np.array_equal(x, kept[0])
    assert np.array_equal(y, kept[1])
    check_it_holds(x, y, rules, found)
    again = anonymise(x, y, SCHEMA, rules, "table")
    assert np.array_equal(found.x, again.x)
    assert found.cost == again.cost


def test_more_anonymity_costs_more() -> None:
    x, y = table_of(0, 400)
    costs = [
        anonymise(x, y, SCHEMA, Anonymity(quasi_identifiers=["age", "city", "pay"], k=k), "table").cost
        for k in (2, 5, 20, 100)
    ]
    for less, more in pairwise(costs):
        assert less.loss < more.loss
        assert less.discernibility < more.discernibility
        assert less.classes > more.classes
    strict = Anonymity(quasi_identifiers=["age", "city", "pay"], k=2, t=0.1)
    assert anonymise(x, y, SCHEMA, strict, "table").cost.loss > costs[0].loss


def test_a_class_takes_the_lowest_node_that_covers_it() -> None:
    x = np.zeros((4, 8), np.float32)
    x[[0, 1, 2, 3], [1, 2, 4, 4]] = 1  # lyon, nice, rome, rome
    y = np.zeros(4, np.int64)
    flat = anonymise(x, y, SCHEMA, Anonymity(quasi_identifiers=["city"], k=2), "table")
    assert flat.x[:2, 1:6].tolist() == [[0.5, 0.5, 0, 0, 0]] * 2
    nested = Anonymity(quasi_identifiers=["city"], k=2, hierarchies=HIERARCHY)
    found = anonymise(x, y, SCHEMA, nested, "table")
    assert found.x[:2, 1:6] == pytest.approx(np.array([[1 / 3, 1 / 3, 1 / 3, 0, 0]] * 2))
    assert found.x[2:, 1:6].tolist() == [[0, 0, 0, 1, 0]] * 2
    assert (flat.cost.loss, found.cost.loss) == (0.5 * 1 / 4, 0.5 * 2 / 4)
    tree = nested.trees["city"]
    assert tree == (("lyon", "nice", "paris"), ("rome", "turin"))
    assert covering(tree, frozenset({"lyon", "rome"})) == CITIES
    assert covering(tree, frozenset({"rome"})) == ("rome",)


def test_an_outlier_is_suppressed_where_that_loses_less() -> None:
    x = np.zeros((9, 8), np.float32)
    x[:, 1] = 1
    x[:, 0] = [30, 31, 32, 33, 34, 35, 36, 37, 1000]
    rules = Anonymity(quasi_identifiers=["age"], k=5, suppress=0.12)
    found = anonymise(x, np.zeros(9, np.int64), SCHEMA, rules, "table")
    assert found.rows.tolist() == list(range(8))
    assert (found.cost.suppressed, found.cost.classes) == (1, 1)
    assert found.cost.discernibility == 8**2 + 9
    assert found.cost.loss == pytest.approx((1 + 8 * 7 / 970) / 9)
    kept = anonymise(x, np.zeros(9, np.int64), SCHEMA, Anonymity(quasi_identifiers=["age"], k=5), "table")
    assert (kept.cost.suppressed, kept.cost.loss) == (0, 1.0)


def test_outliers_stay_within_the_budget_and_the_rules() -> None:
    units = np.array([[0.0], [0.1], [0.9], [1.0], [0.0], [0.0], [0.0], [1.0]])
    classes = as_rows([[0, 1, 2, 3], [4, 5, 6, 7]])
    taken = outliers(units, classes, lambda rows: len(rows) >= 2, 1)
    assert {number: rows.tolist() for number, rows in taken.items()} == {1: [7]}
    assert outliers(units, classes, lambda _: False, 4) == {}
    assert outliers(units, classes, lambda _: True, 0) == {}
    assert [rows.tolist() for rows in mondrian(units, np.arange(8), lambda rows: len(rows) >= 4)] == [
        [0, 4, 5, 6],
        [1, 2, 3, 7],
    ]


def test_too_frequent_values_are_suppressed() -> None:
    x, _ = table_of(3, 100)
    y = np.repeat([0, 1], [55, 45])
    rules = Anonymity(quasi_identifiers=["age"], k=5, alpha=0.5, suppress=0.1)
    found = anonymise(x, y, SCHEMA, rules, "table")
    assert np.bincount(y[found.rows]).tolist() == [45, 45]
    with pytest.raises(DataError, match=r"90 of its 100.*reach k=90.*alpha=0\.5,") as caught:
        anonymise(x, y, SCHEMA, Anonymity(quasi_identifiers=["age"], k=5, alpha=0.4, suppress=0.1), "table")
    assert "task.anonymity.suppress=0.1" in str(caught.value)


def test_no_rows_are_anonymous() -> None:
    x, y = table_of(0, 0)
    found = anonymise(x, y, SCHEMA, Anonymity(quasi_identifiers=["age", "city"], k=5), "table")
    assert (found.x.shape, len(found.rows), found.classes) == ((0, 8), 0, [])
    x, y = table_of(0, 50)
    other = anonymise(x, y, SCHEMA, Anonymity(quasi_identifiers=["age"], k=5), "table").cost
    assert total([found.cost, other]) == other
    assert "k=5" in str(other)
    assert "0 of 50 rows suppressed" in str(other)


# Bad inputs

BASE: dict[str, Any] = {"quasi_identifiers": ["age"], "k": 2}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"k": 1}, r"task\.anonymity\.k .* at least 2, got 1"),
        ({"k": 2.5}, r"task\.anonymity\.k .* got 2\.5"),
        ({"quasi_identifiers": []}, r"task\.anonymity\.quasi_identifiers must list"),
        ({"quasi_identifiers": ["age", "age"]}, r"task\.anonymity\.quasi_identifiers must list different"),
        ({"sensitive": "ill"}, r"task\.anonymity\.sensitive must list"),
        ({"sensitive": ["age"]}, r"both list \['age'\]"),
        ({"distinct_l": 0}, r"task\.anonymity\.distinct_l .* got 0"),
        ({"entropy_l": 0.5}, r"task\.anonymity\.entropy_l .* at least 1, got 0\.5"),
        ({"alpha": 0.0}, r"task\.anonymity\.alpha .* above 0 .* got 0"),
        ({"t": 1.5}, r"task\.anonymity\.t .* at most 1, got 1\.5"),
        ({"suppress": 1.0}, r"task\.anonymity\.suppress .* below 1, got 1"),
        ({"hierarchies": {"city": ["a", ["a"]]}}, r"hierarchies\.city must nest lists .* each category once"),
        ({"hierarchies": {"city": "lyon"}}, r"hierarchies\.city must nest lists"),
        ({"hierarchies": {"city": [[]]}}, r"hierarchies\.city must nest lists"),
    ],
)
def test_wrong_settings(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Anonymity(**BASE | wrong)


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (
            {"quasi_identifiers": ["shoe"]},
            r"quasi_identifiers names shoe, .*no feature: .*'age', 'city'",
        ),
        ({"sensitive": ["shoe"]}, r"sensitive names shoe, which is no feature"),
        (
            {"quasi_identifiers": ["city"], "hierarchies": {"city": [["lyon"], ["rome"]]}},
            r"lacks \['nice'",
        ),
        ({"hierarchies": {"city": [[*CITIES]]}}, r"\['city'\], which are neither quasi-identifiers nor"),
        ({"hierarchies": {"age": [["1"], ["2"]]}}, r"hierarchies\.age is for a column of numbers"),
        (
            {"sensitive": ["dose"], "hierarchies": {"dose": [["1"]]}},
            r"hierarchies\.dose is for a col",
        ),
        ({"hierarchies": {"ill": [["no"], ["yes"]]}}, r"hierarchies\.ill lacks \['maybe'\]"),
    ],
)
def test_rules_that_do_not_fit_the_table(rules: dict[str, Any], said: str) -> None:
    x, y = table_of(0, 20)
    with pytest.raises(ConfigError, match=said):
        anonymise(x, y, SCHEMA, Anonymity(**BASE | rules), "table")


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"k": 21}, r"table cannot be as anonymous .*20 of its 20 rows as one class reach k=20"),
        ({"k": 2, "distinct_l": 4}, r"distinct l=3"),
        ({"k": 2, "entropy_l": 3.5}, r"entropy l=2\."),
        ({"k": 2, "alpha": 0.1}, r"alpha=0\.\d+"),
    ],
)
def test_rules_that_cannot_be_reached(rules: dict[str, Any], said: str) -> None:
    x, _ = table_of(0, 20)
    y = np.repeat([0, 1, 2], [11, 5, 4])
    with pytest.raises(DataError, match=said) as caught:
        anonymise(x, y, SCHEMA, Anonymity(**BASE | rules), "table")
    assert "task.anonymity.suppress=0" in str(caught.value)


# In the task


def csv(tmp_path: Path, rules: Anonymity | None, rows: int = 120, **settings: Any) -> Csv:
    rng = np.random.default_rng(1)
    ill = np.where(rng.random(rows) < 0.4, "yes", "no")
    ages, cities = rng.integers(18, 90, rows), rng.choice(CITIES, rows)
    lines = [f"{ages[i]},{cities[i]},{i},{'ab'[i % 2]},{ill[i]}" for i in range(rows)]
    (tmp_path / "table.csv").write_text("\n".join(["age,city,number,site,ill", *lines]))
    given: dict[str, Any] = {"partition": Iid(), "clients": 3, "test_fraction": 0.25, "label": "ill"}
    given |= {"path": str(tmp_path / "table.csv"), "client_column": "site", "anonymity": rules}
    return Csv(build=Logistic(), seed=0, **given | settings)


RULES = Anonymity(quasi_identifiers=["age", "city"], k=4, distinct_l=2, suppress=0.1)


def test_each_client_is_anonymous_by_itself(tmp_path: Path) -> None:
    raw, task = csv(tmp_path, None, mean=5.0, std=2.0), csv(tmp_path, RULES, mean=5.0, std=2.0)
    before, after = raw.train_data(), task.train_data()
    labels = dict(zip(before.x[:, 6].tolist(), before.y.tolist(), strict=True))
    assert [labels[number] for number in after.x[:, 6].tolist()] == after.y.tolist()  # rows keep their labels
    assert (np.diff(after.x[:, 6]) > 0).all()  # and their order
    parts = task.partitions()
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(after)))
    for client in range(3):
        data = task.client_data({"partition-id": client})
        assert {*data.x[:, 6].tolist()} <= {*raw.client_data({"partition-id": client}).x[:, 6].tolist()}
        _, ids, counts = np.unique(data.x[:, :6], axis=0, return_inverse=True, return_counts=True)
        assert counts.min() >= 4
        assert all(len(data.y[ids == one].unique()) == 2 for one in range(len(counts)))
    assert task.anonymity_cost is not None
    assert task.anonymity_cost.rows == 90
    assert task.anonymity_cost.suppressed == 90 - len(after)
    assert task.anonymity_cost.measures is not None
    assert task.anonymity_cost.measures.k >= 4
    assert (task.label_counts().sum(), raw.anonymity_cost) == (len(after), None)


def test_test_rows_stay_as_they_are(tmp_path: Path) -> None:
    raw, hidden = csv(tmp_path, None, std=3.0).test_data(), csv(tmp_path, RULES, std=3.0).test_data()
    assert raw is not None
    assert hidden is not None
    assert torch.equal(raw.x, hidden.x)


def test_natural_clients_and_empty_ones(tmp_path: Path) -> None:
    task = csv(tmp_path, RULES, partition=Natural(), clients=2)
    for client in range(2):
        assert {*(task.client_data({"partition-id": client}).x[:, 6] % 2).tolist()} == {float(client)}


def test_a_client_with_fewer_rows_than_k_is_named(tmp_path: Path) -> None:
    task = csv(tmp_path, Anonymity(quasi_identifiers=["age"], k=31))
    with pytest.raises(DataError, match=r"client 0 of .*table\.csv cannot be .* reach k=30"):
        task.partitions()


def test_a_nodes_own_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = csv(tmp_path, RULES)
    with caplog.at_level("INFO", "fedapp.tasks"):
        data = task.client_data({"data": str(tmp_path / "table.csv")})
    assert np.unique(data.x[:, :6], axis=0, return_counts=True)[1].min() >= 4
    assert "rows suppressed" in caplog.text


def test_what_does_not_go_with_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must not list the label ill"):
        csv(tmp_path, Anonymity(quasi_identifiers=["age", "ill"], k=4))
    with pytest.raises(ConfigError, match=r"task\.standardize=true takes statistics of rows"):
        csv(tmp_path, RULES, standardize=True)
    assert csv(tmp_path, RULES).private_preprocessing is True  # differential privacy refuses it


def test_settings_make_it(tmp_path: Path) -> None:
    csv(tmp_path, None)
    table = f"task=csv task.path={tmp_path / 'table.csv'} task.label=ill model=mlp clients=2 partition=iid "
    job = config.job(config.compose(table + "privacy=none"))
    assert isinstance(job.task, Csv)
    assert job.task.anonymity is None
    rules = (
        "task.anonymity.quasi_identifiers=[age,city] task.anonymity.k=3 task.anonymity.t=0.4 "
        "task.anonymity.hierarchies={city:{france:[lyon,nice,paris],italy:[rome,turin]}} "
    )
    job = config.job(config.compose(table + "privacy=none " + rules))
    assert isinstance(job.task, Csv)
    assert job.task.anonymity == Anonymity(
        quasi_identifiers=["age", "city"], k=3, t=0.4, hierarchies=HIERARCHY
    )
    assert len(job.task.client_data({"partition-id": 0})) > 0
    with pytest.raises(ConfigError, match="privacy=example keeps what is private"):
        config.job(config.compose(table + rules))
    for half in ("task.anonymity.k=3", "task.anonymity.t=0.2", "task.anonymity.quasi_identifiers=[age]"):
        with pytest.raises(ConfigError, match=r"alone: set task\.anonymity\.quasi_identifiers"):
            config.job(config.compose(f"{table} privacy=none {half}"))
    assert required() is None
