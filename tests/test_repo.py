"""The repository as a reader finds it: imports, keys, README commands, and the rules for lines."""
import ast
import collections
import io
import os
import re
import shlex
import tokenize

import pytest

from configurator import override
from tests_support import ROOT, load_script



def python_files(folder):
    """Paths of the .py files in a folder of the repository."""
    files = sorted(os.listdir(os.path.join(ROOT, folder)))
    return [os.path.join(folder, file) for file in files if file.endswith(".py")]


CONFIGS = [os.path.basename(file) for file in python_files("config")]
MODULES = [file[:-3] for file in python_files("")]
SOURCES = sum(map(python_files, ("", "comparisons", "config", "tests")), [])

# Exceptions to the rules, by name
DRAWING = ("phantom.py", "pictures.py")  # coordinates and colours make long lines of short tokens
OTHER_DEFAULT = {"model_name", "local_crops_number", "dino_head_out_dim", "teacher_temp",
                 "warmup_iterations"}  # distill.py is another method
MAIN_LINES = {"train.py": 190, "distill.py": 250}
FILE_LINES = {"train.py": 465, "distill.py": 560, "evaluate.py": 450}


def read(path):
    return open(os.path.join(ROOT, path)).read()


SCRIPTS = [name for name in MODULES if "\nconfig_keys = list_keys(" in read(f"{name}.py")]


def tree(name):
    return ast.parse(read(f"{name}.py"))


def imports(name):
    """Modules of ours that a module imports."""
    names = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names & set(MODULES)


# ---- imports ----

def test_imports_form_a_dag_and_no_script_imports_a_script():
    visited, finished = set(), set()

    def visit(name):
        if name in finished:
            return
        assert name not in visited, f"import cycle through {name}"
        visited.add(name)
        for other in imports(name):
            allowed = (name, other) == ("bench", "train")  # bench times the step at train's config
            assert other not in SCRIPTS or allowed, f"{name} imports the script {other}"
            visit(other)
        finished.add(name)
    for name in MODULES:
        visit(name)


def test_only_one_file_has_the_step():
    """Backward and the optimizer's step are called in dino.py and, another method, distill.py."""
    for name in MODULES:
        calls = {node.func.attr for node in ast.walk(tree(name))
                 if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)}
        trains = "unscale_" in calls
        assert trains == (name in ("dino", "distill")), name
    for user in ("train", "bench"):
        assert {"dino.forward_backward", "dino.update"} <= attributes(user)
    assert "forward_backward(" in read("tests/test_golden.py")


def attributes(name):
    """{'module.attribute'} that a module reads."""
    return {f"{node.value.id}.{node.attr}" for node in ast.walk(tree(name))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}


# ---- keys ----

@pytest.mark.parametrize("script", SCRIPTS)
def test_every_key_is_read_and_none_is_assigned(script):
    """A key that nothing reads lies to its user. A key assigned in a function becomes local there
    and raises when it is read."""
    module = load_script(script)
    names = []
    for function in functions(tree(script)):
        names += [node for node in ast.walk(function) if isinstance(node, ast.Name)]
    used = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    # modules get the config of train.py, distill.py and bench.py as a namespace
    for name in MODULES:
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("config"):
                used.add(node.attr)
    for name in ("model", "data"):  # by name: getattr(config, key)
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.Constant):
                used.add(node.value)
    assert set(module.config_keys) - used == set()
    assigned = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    assert set(module.config_keys) & assigned == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_key_has_a_comment(script):
    for key in load_script(script).config_keys:
        assert re.search(rf"^{key} = .*  ?# \S", read(f"{script}.py"), re.M), key


def test_shared_keys_have_equal_defaults_and_comments():
    train, distill = load_script("train"), load_script("distill")
    shared = set(train.config_keys) & set(distill.config_keys)
    different = {key for key in shared if getattr(train, key) != getattr(distill, key)}
    assert different == OTHER_DEFAULT
    comments = [dict(re.findall(r"^(\w+) = .*?  ?# (.*)", read(file), re.M))
                for file in ("train.py", "distill.py")]
    for key in shared - OTHER_DEFAULT - {"momentum_teacher"}:
        assert comments[0][key] == comments[1][key], key


# ---- config files and README ----

@pytest.mark.parametrize("config", CONFIGS)
def test_config_file_has_a_header_with_its_command(config):
    header = ast.get_docstring(ast.parse(read(f"config/{config}")))
    assert f"config/{config}" in header
    assert re.search(r"(train|distill)\.py config/", header), "--help would not list it"
    assert header.split("\n")[0].strip().endswith((".", ":")), "--help shows the first line"


def readme_commands():
    blocks = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", read("README.md"), re.S))
    return re.findall(r"^\s*(?:torchrun|python)\s.*$", blocks.replace("\\\n", " "), re.M)


def test_readme_commands_parse_and_name_what_exists():
    assert len(readme_commands()) >= 5
    for command in readme_commands():
        words = shlex.split(command, comments=True)
        script = next((word for word in words if word.endswith(".py")), None)
        if script is None:
            continue
        assert os.path.isfile(os.path.join(ROOT, script)), command
        if script[:-3] not in SCRIPTS:
            continue
        module, argv = load_script(script[:-3]), []
        for word in words[words.index(script) + 1:]:
            if word.startswith("config/"):
                argv.append(os.path.join(ROOT, word))
            elif not word.startswith(("out/", "--help")):
                argv.append(word)
        override(vars(module), module.config_keys, argv)


def test_readme_names_files_that_exist_and_is_short():
    readme = read("README.md")
    assert readme.count("\n") <= 285  # 250 and the sections on volumes and features
    for name in re.findall(r"[`(]([\w/]+\.(?:py|txt|png|json|md))[`)]", readme):
        if name.split("/")[0] not in ("out", "samples", "results"):  # what a run writes
            assert os.path.exists(os.path.join(ROOT, name)), name


def test_every_module_stands_in_the_readme():
    readme = read("README.md")
    for name in MODULES:
        assert f"`{name}.py`" in readme, name


def test_every_test_file_has_tests():
    for file in os.listdir(os.path.join(ROOT, "tests")):
        if file.startswith("test_"):
            assert "def test_" in read(f"tests/{file}"), file


# ---- the rules for lines ----

def functions(parsed):
    return [node for node in ast.walk(parsed) if isinstance(node, ast.FunctionDef)]


def is_truth_value(node):
    """A comparison, `not x`, True or False."""
    negation = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    constant = isinstance(node, ast.Constant) and isinstance(node.value, bool)
    return negation or constant or isinstance(node, (ast.Compare, ast.BoolOp))


def is_text_or_list(node):
    text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return text or isinstance(node, (ast.List, ast.JoinedStr))


def broken_rules(source):
    """[(line, rule)] of what the rules forbid, except for long lines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        inside = [other for other in ast.walk(node) if other is not node]
        if isinstance(node, ast.IfExp) and any(isinstance(other, ast.IfExp) for other in inside):
            found.append((node.lineno, "a conditional expression inside another"))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            pairs = ((node.left, node.right), (node.right, node.left))
            if any(is_text_or_list(a) and is_truth_value(b) for a, b in pairs):
                found.append((node.lineno, "a string or list times a bool"))
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            values = getattr(node.value, "elts", [node.value])
            if any(isinstance(value, ast.IfExp) for value in values):
                found.append((node.lineno, "a tuple assignment with a conditional"))
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            if len(node.generators) > 1:
                found.append((node.lineno, "a comprehension with several `for`"))
            if node.end_lineno - node.lineno > 1:
                found.append((node.lineno, "a comprehension over more than two lines"))
    return found


def tokens_per_line(source):
    kinds = (tokenize.NAME, tokenize.NUMBER, tokenize.OP, tokenize.STRING)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return collections.Counter(token.start[0] for token in tokens if token.type in kinds)


@pytest.mark.parametrize("bad", [
    "x = 1 if a else 2 if b else 3", "x = [1] * (a > b)", "x = 'a' * (not b)",
    "a, b = (1 if c else 2), 3", "a, b = x if c else y", "x = [i for a in b for i in a]",
    "x = [i\n     for i in a\n     if i]"])
def test_the_rules_find_what_they_forbid(bad):
    assert broken_rules(bad)


@pytest.mark.parametrize("file", SOURCES)
def test_lines_follow_the_rules(file):
    source = read(file)
    wide = [i for i, line in enumerate(source.split("\n"), 1) if len(line) > 100]
    assert wide == [], "lines over 100 columns"
    assert broken_rules(source) == []
    if file not in DRAWING and not file.startswith("tests"):
        dense = [i for i, count in tokens_per_line(source).items() if count > 25]
        assert dense == [], "lines of more than 25 tokens"


@pytest.mark.parametrize("file", SOURCES)
def test_functions_and_files_are_short(file):
    source = read(file)
    for function in functions(ast.parse(source)):
        limit = MAIN_LINES.get(file, 110) if function.name == "main" else 110
        assert function.end_lineno - function.lineno + 1 <= limit, function.name
    assert source.count("\n") <= FILE_LINES.get(file, 10**6)


def test_the_two_mains_share_few_lines():
    mains = []
    for name in ("train", "distill"):
        main = next(node for node in functions(tree(name)) if node.name == "main")
        lines = read(f"{name}.py").split("\n")[main.lineno - 1:main.end_lineno]
        mains.append(collections.Counter(line.strip() for line in lines if line.strip()))
    assert sum((mains[0] & mains[1]).values()) <= 100


def test_importing_modules_changes_nothing_in_other_libraries():
    """Smells of before: a warning of Pillow became an error, an attention was registered."""
    for name in MODULES:
        if name in SCRIPTS:
            continue
        for node in tree(name).body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                raise AssertionError(f"{name}.py calls {ast.unparse(node.value)} when imported")
