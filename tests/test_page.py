"""The page of `explain` as HTML and LaTeX: whole, well-formed, without scripts, and with everything that the plain text has."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

import gpubackprop as gb
from gpubackprop.inspect.explain import Explanation
from gpubackprop.inspect.page import Arrays, Formula, Item, Note, Page, Pair, Stage, Table, Words
from gpubackprop.inspect.typeset import latex, mathml

VOID = {"meta"}
CHILDREN = {"msub": 2, "msup": 2, "mfrac": 2, "msubsup": 3}


@pytest.fixture(scope="module", params=[[3, 2], [2, 3, 2], [4, 8, 8, 3]], ids=str)
def explanation(request: pytest.FixtureRequest) -> Explanation:
    return gb.explain(request.param, activation="tanh")


class Nesting(HTMLParser):
    """Checks that every element is closed in its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_html_page_is_well_formed_and_holds_everything(explanation: Explanation) -> None:
    page = explanation.html()
    parser = Nesting()
    parser.feed(page)
    assert parser.open == []
    ids = {attributes["id"] for _, attributes in parser.tags if "id" in attributes}
    links = {str(attributes["href"]).removeprefix("#") for tag, attributes in parser.tags if tag == "a"}
    assert ids == links == {f"part-{number}" for number in range(1, 10)}
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in parser.tags}
    assert "http" not in page
    assert page.count("✓") == str(explanation).count("✓")
    assert page.count("<details>") == sum(isinstance(b, Arrays) for part in explanation.page.parts for b in part.blocks)
    assert explanation.html(values=True).count("<details open>") == page.count("<details>")


def test_every_equation_of_the_html_page_is_mathml_with_the_right_children(explanation: Explanation) -> None:
    found = re.findall(r"<math>.*?</math>", explanation.html())
    assert len(found) > 50
    for equation in found:
        tree = ElementTree.fromstring(equation)
        for element in tree.iter():
            assert len(element) == CHILDREN.get(element.tag, len(element)), equation
        assert not re.search(r"[_^ᵀ{}]", "".join(tree.itertext())), equation


def test_the_latex_document_is_balanced_and_holds_every_block(explanation: Explanation) -> None:
    document = explanation.latex(values=True)
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", document):
        depth += 1 if brace == "{" else -1
        assert depth >= 0
    assert depth == 0
    assert len(re.findall(r"(?<!\\)\$", document)) % 2 == 0
    for kind in ("document", "tabular", "pmatrix", "minipage"):
        assert document.count(rf"\begin{{{kind}}}") == document.count(rf"\end{{{kind}}}") > 0
    blocks = [*explanation.page.introduction, *(b for part in explanation.page.parts for b in part.blocks)]
    assert document.count("\n\\pair{") == sum(isinstance(b, Pair) for b in blocks)
    assert document.count("\n\\note{") == sum(isinstance(b, Note) for b in blocks)
    assert document.count(r"\section{") == 9
    outside = re.sub(r"\$[^$]*\$", "", document)
    assert not re.search(r"[∇δφℓΣᵀ⊙⇐−✓′]", outside)


def test_numbers_in_arrays_are_shown_where_they_are_asked_for(explanation: Explanation) -> None:
    number = f"{explanation.step.names.array('X')[0, 0]:.4f}"
    assert number not in explanation.text()
    assert number in explanation.text(values=True)
    assert r"\begin{pmatrix}" not in explanation.latex()


@pytest.mark.parametrize(
    ("equation", "written"),
    [
        (
            "∇W_o = (∂o/∂W_o)ᵀ ∇o",
            r"\nabla_{\mathbf{W}_{o }} \ =\ (\frac{\partial o}{\partial \mathbf{W}_{o }} )^{T} \ \nabla_{o}",
        ),
        ("δ_1 = dh_1 ⊙ φ′(z_1)", r"\delta_{1} \ =\ \mathrm{d}\mathbf{h}_{1} \ \odot \ \phi' (\mathbf{z}_{1} )"),
        ("h_{l-1} W_l", r"\mathbf{h}_{l -1} \ \mathbf{W}_{l }"),
        ("s = h(r)", r"s \ =\ h(r )"),
    ],
)
def test_an_equation_is_typeset(equation: str, written: str) -> None:
    assert latex(equation) == written


def test_a_number_above_a_subscript_stands_above_it() -> None:
    assert mathml("W_1ᵀ").count("<msubsup>") == 1


def test_what_is_wrong_stands_out_and_markup_in_names_is_escaped() -> None:
    page = Page("A <b>")
    blocks = (
        Words("x < y"),
        Item(1, "item"),
        Stage(2, "stage"),
        Pair("o", "o"),
        Note("✗ 1e-01 DIFFERS", "1×1", "2 FLOP"),
    )
    page.part("One & two", *blocks, Formula("p = q", "✓ 1e-12"), Table([("a", "1")], "<>", (3, 3), header=False))
    explanation = Explanation("", page, [], None, 0.0, False)  # type: ignore[arg-type]
    html = explanation.html()
    assert '<span class="bad">✗ 1e-01 DIFFERS</span>' in html
    assert '<span class="good">✓ 1e-12</span>' in html
    assert "A &lt;b&gt;" in html
    assert "One &amp; two" in html
    assert "&lt; " in html
    assert r"One \& two" in explanation.latex()


def test_what_is_too_long_for_a_column_stands_below() -> None:
    page = Page("title")
    page.part("one", Pair("l" * 50, "r"), Pair("l", "r"), Note("n" * 50, "shape", "1 FLOP"))
    lines = page.plain().splitlines()
    assert "      " + "l" * 50 in lines
    assert "      r" in lines
    assert any(line.startswith("      l   ") and line.endswith(" r") for line in lines)
    assert "      " + "n" * 50 in lines
    assert any(line.strip().startswith("shape") for line in lines)
