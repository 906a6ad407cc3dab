"""Equations of a page, typeset: one parser, with MathML and LaTeX writers."""

from __future__ import annotations

import re
from collections.abc import Callable
from html import escape
from typing import NamedTuple

BELOW = r"_(?:\{[^}]*\}|[A-Za-z0-9]+)"
NAME = rf"[ΣA-Za-zφδΘηℓ](?:{BELOW})?"
SUBSCRIPT = re.compile(r"_(?:\{([^}]*)\}|([A-Za-z0-9]+))$")
TOKEN = re.compile(
    rf"""
    ∂(?P<above>ℓ\(o,y\)|{NAME})/∂(?P<below>{NAME})    # a partial derivative
  | d(?P<over>[a-z])/d(?P<under>[a-z])(?![\w])         # a derivative
  | (?P<whole>∇_[a-z]\^ℓ\(o,y\))                      # a gradient, in the text's notation
  | (?P<nabla>∇{NAME})(?![A-Za-z])                     # and the short form that the page declares
  | (?P<gradient>d[A-Zabhoz](?:{BELOW})?)(?![A-Za-z])  # in ours
  | (?P<word>[A-Za-z]{{2,}})
  | (?P<name>{NAME})
  | (?P<raised>ᵀ|²|′|\^\([^)]*\)|\^\w)
  | (?P<lowered>_[A-Za-z0-9]+)
  | (?P<number>-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?)
  | (?P<space>\s+)
  | (?P<sign>.)
    """,
    re.VERBOSE,
)
IN_WORDS = re.compile(
    rf"""
    ∇_[a-z]\^ℓ\(o,y\) | [∇∂]?d?[ΣA-Za-zφδΘη]{BELOW}[ᵀ′]? | ∇[A-Za-zΘ](?![A-Za-z])   # what has a subscript, gradients
  | (?<![A-Za-z])d[abo](?![A-Za-z]) | φ′? | [δΘηℓ](?!\w) | (?<=\))(?:ᵀ|_[a-z]) | R\^\d+
  | (?<![\w'’])[b-zC-Z](?![\w'’])[ᵀ′]?                                                   # a letter alone, but for the article
    """,
    re.VERBOSE,
)
"""What is typeset within a sentence; the rest is words."""

RAISED = {"ᵀ": "T", "²": "2", "′": "′"}


class Writer(NamedTuple):
    """How a parser's pieces are written; each function takes pieces already written."""

    symbol: Callable[[str, str, str], str]
    """Of an operator before it ("∇", "d" or nothing), a letter, and what is written of its subscript."""
    function: Callable[[str], str]
    """A letter that is not an array, as h in h(r)."""
    fraction: Callable[[str, str], str]
    raised: Callable[[str, str], str]
    lowered: Callable[[str, str], str]
    word: Callable[[str], str]
    number: Callable[[str], str]
    sign: Callable[[str], str]
    space: Callable[[str], str]
    join: Callable[[list[str]], str]


def write(equation: str, to: Writer) -> str:
    """Return an equation as a writer writes it."""
    done: list[str] = []
    for match in TOKEN.finditer(equation.strip()):
        kind, text = match.lastgroup, match.group()
        if kind == "below":
            top, bottom = match["above"], match["below"]
            above = (
                to.join([_symbol("∂", "ℓ", to), write(top[1:], to)]) if top.startswith("ℓ(") else _symbol("∂", top, to)
            )
            done.append(to.fraction(above, _symbol("∂", bottom, to)))
        elif kind == "under":
            done.append(to.fraction(_symbol("d", match["over"], to), _symbol("d", match["under"], to)))
        elif kind == "whole":
            done.append(_symbol("∇ℓ", text[2], to))
        elif kind == "nabla":
            done.append(_symbol("∇", text[1:], to))
        elif kind == "gradient":
            done.append(_symbol("d", text[1:], to))
        elif kind == "name":
            called = len(text) == 1 and equation.strip()[match.end() :].startswith("(")
            done.append(to.function(text) if called and text in "fghs" else _symbol("", text, to))
        elif kind in ("raised", "lowered"):
            base = done.pop() if done else ""
            inner = RAISED.get(text) or to.join([write(text.strip("^_()"), to)])
            done.append(to.raised(base, inner) if kind == "raised" else to.lowered(base, inner))
        else:
            done.append(getattr(to, kind or "sign")(text))
    return to.join(done)


def _symbol(operator: str, name: str, to: Writer) -> str:
    found = SUBSCRIPT.search(name)
    below = "" if found is None else found[1] or found[2]
    return to.symbol(operator, name[: found.start()] if found else name, write(below, to) if below else "")


def write_words(sentence: str, text: Callable[[str], str], math: Callable[[str], str]) -> str:
    """Return a sentence, its symbols written by ``math`` and the words between them by ``text``."""
    done, at = [], 0
    for match in IN_WORDS.finditer(sentence):
        done += [text(sentence[at : match.start()]), math(match.group())]
        at = match.end()
    return "".join([*done, text(sentence[at:])])


def is_equation(text: str) -> bool:
    """Return whether a cell of a table is an equation, not words."""
    return any(sign in text for sign in "_(=ᵀ⊙/∇[") or not re.search(r"[A-Za-z]{2}", text)


def _is_array(letter: str) -> bool:
    return letter in "WbhxzX"


# ------------------------------------------------------------------ MathML


def _mathml_symbol(operator: str, letter: str, below: str) -> str:
    if letter == "Σ":
        letter_written = "<mo>∑</mo>"
    else:
        letter_written = f'<mi class="array">{letter}</mi>' if _is_array(letter) else f"<mi>{letter}</mi>"
    written = f"<msub>{letter_written}<mrow>{below}</mrow></msub>" if below else letter_written
    if operator == "∇":
        return f"<msub><mo>∇</mo>{written}</msub>"
    if operator == "∇ℓ":
        return f"<msubsup><mo>∇</mo>{written}<mrow><mi>ℓ</mi><mo>(</mo><mi>o</mi><mo>,</mo><mi>y</mi><mo>)</mo></mrow></msubsup>"
    return f"<mrow><mo rspace='0'>{operator}</mo>{written}</mrow>" if operator else written


def _mathml_raised(base: str, top: str) -> str:
    top = {"T": "<mi>T</mi>", "′": "<mo>′</mo>", "2": "<mn>2</mn>"}.get(top, top)
    if base.startswith("<msub>") and "∇" not in base:  # above the subscript, not beside it
        return f"<msubsup>{base.removeprefix('<msub>').removesuffix('</msub>')}<mrow>{top}</mrow></msubsup>"
    return f"<msup>{base or '<mrow></mrow>'}<mrow>{top}</mrow></msup>"


MATHML = Writer(
    symbol=_mathml_symbol,
    function=lambda letter: f"<mi>{letter}</mi>",
    fraction=lambda a, b: f"<mfrac><mrow>{a}</mrow><mrow>{b}</mrow></mfrac>",
    raised=_mathml_raised,
    lowered=lambda base, below: f"<msub>{base or '<mrow></mrow>'}<mrow>{below}</mrow></msub>",
    word=lambda text: f"<mtext>{text}</mtext>",
    number=lambda text: f"<mn>{text.replace('-', '−')}</mn>",
    sign=lambda text: f'<mo stretchy="false">{escape(text)}</mo>',
    space=lambda text: f'<mspace width="{min(0.25 * len(text), 1)}em"></mspace>',
    join="".join,
)


def mathml(equation: str) -> str:
    """Return an equation for HTML."""
    return f"<math>{write(equation, MATHML)}</math>"


# ------------------------------------------------------------------ LaTeX

LATEX_SIGNS = {
    "−": "-", "·": r"\cdot ", "⊙": r"\odot ", "⇐": r"\Leftarrow ", "←": r"\leftarrow ", "×": r"\times ", "…": r"\ldots ",
    "⋮": r"\vdots ", "±": r"\pm ", "≤": r"\le ", "→": r"\to ", "{": r"\{", "}": r"\}", "%": r"\%", "ᵀ": "^T",
    "✓": r"\checkmark ", "✗": r"\times ",
    "∇": r"\nabla ", "∂": r"\partial ",
}  # fmt: skip
LATEX_LETTERS = {"φ": r"\phi", "δ": r"\delta", "Θ": r"\Theta", "η": r"\eta", "ℓ": r"\ell", "Σ": r"\sum"}


def _latex_symbol(operator: str, letter: str, below: str) -> str:
    written = rf"\mathbf{{{letter}}}" if _is_array(letter) else LATEX_LETTERS.get(letter, letter)
    written += f"_{{{below}}}" if below else ""
    if operator[:1] == "∇":
        return rf"\nabla_{{{written}}}" + (r"^{\ell(o,y)} " if operator == "∇ℓ" else " ")
    return {"∂": rf"\partial {written} ", "d": rf"\mathrm{{d}}{written} "}.get(operator, written + " ")


LATEX = Writer(
    symbol=_latex_symbol,
    function=lambda letter: letter,
    fraction=lambda a, b: rf"\frac{{{a.strip()}}}{{{b.strip()}}} ",
    raised=lambda base, top: base.rstrip() + ("'" if top == "′" else f"^{{{top.strip()}}}") + " ",
    lowered=lambda base, below: f"{base.rstrip()}_{{{below.strip()}}} ",
    word=lambda text: rf"\text{{{text}}}",
    number=lambda text: text.replace(",", "{,}"),
    sign=lambda text: LATEX_SIGNS.get(text, text),
    space=lambda text: r"\ " if len(text) == 1 else r"\quad ",
    join="".join,
)


def latex(equation: str) -> str:
    """Return an equation for LaTeX's mathematics."""
    return write(equation, LATEX).strip()
