"""Every public name explains each of its arguments or fields, what it returns and raises, and shows an example that
runs."""

import doctest
import inspect
import re

import pytest

import minillm_kernels

PUBLIC = {name: getattr(minillm_kernels, name) for name in minillm_kernels.__all__}
METHODS = {  # of public classes, their own
    f"{name}.{method}": function
    for name, found in PUBLIC.items()
    if inspect.isclass(found)
    for method, function in vars(found).items()
    if inspect.isfunction(function) and not method.startswith("_") and method not in ("extra_repr", "of")
}


def section(docstring: str, title: str) -> str:
    """What is indented below a title."""
    found = re.search(rf"^{title}:\n((?:(?: .*)?\n?)+)", inspect.cleandoc(docstring), re.MULTILINE)
    return found.group(1) if found else ""


def arguments_of(found) -> list[str]:
    given = inspect.signature(found.__init__ if inspect.isclass(found) else found).parameters.values()
    return [p.name for p in given if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


@pytest.mark.parametrize("name", [*PUBLIC, *METHODS])
def test_every_argument_or_field_is_explained(name):
    found = {**PUBLIC, **METHODS}[name]
    fields = getattr(found, "_fields", None)
    explained = section(found.__doc__, "Attributes" if fields else "Args")
    names = re.findall(r"^    (\w+): \S", explained, re.MULTILINE)
    assert names == list(fields or arguments_of(found))


@pytest.mark.parametrize("name", [name for name, found in {**PUBLIC, **METHODS}.items() if inspect.isfunction(found)])
def test_what_a_function_returns_is_explained(name):
    found = {**PUBLIC, **METHODS}[name]
    if not inspect.isgeneratorfunction(inspect.unwrap(found)):  # a context manager
        assert section(found.__doc__, "Returns")


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_runs(name):
    found = PUBLIC[name]
    runner = doctest.DocTestRunner()
    (test, *methods) = doctest.DocTestFinder().find(found, name, module=False, globs={})
    assert any("minillm_kernels" in example.source for example in test.examples), "no example"
    for each in (test, *methods):
        output = []
        result = runner.run(each, out=output.append, clear_globs=False)
        assert result.failed == 0, "".join(output)
