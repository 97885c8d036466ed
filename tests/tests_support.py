"""Shared by the tests that look at a script's config."""
import importlib.util
import os

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def load_script(name):
    """A fresh instance of a script: its config is its globals, so every run gets its own."""
    spec = importlib.util.spec_from_file_location(f"{name}_fresh", os.path.join(ROOT, f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
