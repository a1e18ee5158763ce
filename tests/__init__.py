import pytest

# Its assertions tell as much as those of a test.
pytest.register_assert_rewrite("tests.runs")
