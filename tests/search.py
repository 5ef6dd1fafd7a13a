"""How long the tests that search with Hypothesis do so."""

from hypothesis import settings


def examples(number: int) -> int:
    """How many examples a test takes in the profile that is loaded, that many in the one of every day."""
    return number * settings.default.max_examples // settings.get_profile("fixed").max_examples
