"""Without transformers, and with one that is too old, `register` says what to install."""

import subprocess
import sys
from types import ModuleType

import pytest

from fused_mha.integrations import transformers as integration


@pytest.mark.parametrize("call", [integration.register, lambda: integration.cache(None)], ids=["register", "cache"])
def test_without_transformers_it_says_how_to_install_it(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"not installed: pip install 'fused-mha\[transformers\]'"):
        call()


def test_a_module_that_transformers_misses_is_named_as_it_is(monkeypatch, tmp_path):
    (tmp_path / "transformers.py").write_text("import a_module_that_is_not_there")
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        integration.register()


def test_an_older_one_is_refused(monkeypatch):
    old, modeling = ModuleType("transformers"), ModuleType("transformers.modeling_utils")
    old.__version__, old.modeling_utils = "4.47.1", modeling
    monkeypatch.setitem(sys.modules, "transformers", old)
    monkeypatch.setitem(sys.modules, "transformers.modeling_utils", modeling)
    with pytest.raises(ImportError, match=r"transformers must be 4\.48 or later; got 4\.47\.1"):
        integration.register()


def test_a_cache_without_layers_is_refused(monkeypatch):
    old, caches = ModuleType("transformers"), ModuleType("transformers.cache_utils")
    old.__version__, old.cache_utils = "4.53.3", caches
    monkeypatch.setitem(sys.modules, "transformers", old)
    monkeypatch.setitem(sys.modules, "transformers.cache_utils", caches)
    with pytest.raises(ImportError, match=r"a cache needs transformers 4\.56 or later; got 4\.53\.3"):
        integration.cache(None)


def test_importing_ours_imports_none_of_theirs():
    code = "import sys, fused_mha.integrations.transformers; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
