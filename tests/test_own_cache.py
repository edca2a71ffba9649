"""What the tests themselves keep: in a cache of their own, not in the user's."""

import os
import subprocess
import sys

import pytest

from files import ROOT
from runner import cache, self_check


def test_a_self_check_is_kept_in_the_tests_own_cache(own_cache):
    self_check.once({"check": "of this test"}, dict)
    assert list(own_cache.folder.glob("self-checks/of this test-*.json"))
    assert not list(own_cache.users.glob("self-checks/of this test-*.json"))


@pytest.mark.parametrize("module", [cache, self_check])
def test_a_test_that_would_use_the_users_own_cache_fails(own_cache, monkeypatch, module):
    monkeypatch.setenv("FRANKENMODEL_CACHE", str(own_cache.users))
    with pytest.raises(AssertionError, match="the user's own cache"):
        module.cache_dir()


def test_processes_that_tests_start_use_the_same_cache(own_cache):
    program = "from runner.cache import cache_dir; print(cache_dir())"
    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True).stdout
    assert said.strip() == str(own_cache.folder) == os.environ["FRANKENMODEL_CACHE"]
