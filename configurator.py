"""Config files and --key=value on the command line, applied to the globals of a script; or one clear error.

A script (train.py) opens with a block of lower-case globals: bool, int, float, str or tuple, a line each. It ends with

    config_keys = list_keys(globals())
    ...
    if __name__ == "__main__":
        with one_line_errors():
            main(override(globals(), config_keys, sys.argv[1:]))

A config file is a python file of plain assignments. It runs in a scratch namespace that holds the current values, so
`warmup_iterations = max_iterations // 10` works. Files apply left to right, then the flags: the later one wins.
"""
import ast
import contextlib
import difflib
import errno
import glob
import math
import os
import sys


class UserError(ValueError):
    """Something the user can mend: bad input, bad key, bad file. The message is one line: what, value, rule, fix."""


@contextlib.contextmanager
def one_line_errors():
    """A UserError or a full disk ends the program with one line and exit status 1, without a traceback; bugs keep
    theirs."""
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(f"error: {error.strerror}: {error.filename or 'a log file'} cannot be written; make space. The last "
                 "checkpoint is good, --resume_from=auto goes on from there")


def list_keys(namespace):
    """Names of the config keys: the lower-case globals of a plain type that stand above the call, in their order."""
    return [name for name, value in namespace.items()
            if name == name.lower() and not name.startswith("_") and isinstance(value, (bool, int, float, str, tuple))]


def _coerce(value, default):
    """`value` as the type of `default`, where that is exact; otherwise TypeError with what is needed."""
    if isinstance(default, bool):                      # before int: a bool is an int in python
        if isinstance(value, bool):
            return value
        raise TypeError("true or false")
    if isinstance(default, int):                       # 1e5 is fine for an int because nothing is lost
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1 == int(value):
            return int(value)
        raise TypeError(f"int like {default}")
    if isinstance(default, float):
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        raise TypeError(f"finite float like {default}")
    if isinstance(default, str):
        if isinstance(value, str):
            return value
        raise TypeError(f"str like {default!r}")
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"tuple like {default}" if default else "tuple of numbers")
    if not default:                                    # () means: not set; then any number of numbers may be given
        return tuple(_coerce(item, 0.0) for item in value)
    if len(value) != len(default):
        raise TypeError(f"tuple of {len(default)} like {default}")
    return tuple(_coerce(item, like) for item, like in zip(value, default))


def _parse(text, default):
    """The text after `--key=` as a python value. A str stays as typed: it is never evaluated."""
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        value = ast.literal_eval(text)                 # "0.4,1.0" is a tuple for python, as is "(0.4, 1.0)"
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text                                    # a str where a number is meant: _coerce words the error
    return (value,) if isinstance(default, tuple) and isinstance(value, (int, float)) else value


def _unknown(name, keys):
    near = difflib.get_close_matches(name, keys, n=1)
    return f"unknown key {name!r}" + (f", did you mean {near[0]!r}?" if near else "; --help lists the keys")


def _flag_key(flag, keys):
    """--dino_head.out_dim, --dino-head-out-dim and --crops.global_crops_size: dots and dashes are underscores, and a
    section of the paper's listings may stand in front of a key that is unambiguous without it."""
    joined = flag.replace(".", "_").replace("-", "_")
    bare = flag.split(".", 1)[-1].replace(".", "_").replace("-", "_")
    return bare if joined not in keys and bare in keys else joined


def _run_file(path, values):
    """The names that a config file leaves behind, as a dict; raises UserError when it does not run."""
    if not os.path.isfile(path):
        near = difflib.get_close_matches(path, glob.glob("config/*.py") + glob.glob("*/config/*.py"), n=1)
        raise UserError(f"{path}: no such config file" + (f", did you mean {near[0]}?" if near else ""))
    scratch = dict(values)
    try:
        tree = ast.parse(open(path).read(), path)
        exec(compile(tree, path, "exec"), scratch)
    except Exception as error:                         # whatever is wrong inside belongs to the user, in one line
        raise UserError(f"{path}: {type(error).__name__}: {error}") from None
    imported = {alias.asname or alias.name.split(".")[0] for node in ast.walk(tree)
                if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    return {name: value for name, value in scratch.items() if not name.startswith("_") and name not in imported - set(values)}


def override(namespace, keys, argv):
    """Apply config files and flags to the globals of a script.

    Args: namespace: globals() of the script, changed in place; keys: from list_keys; argv: for example
    ['config/phantom.py', '--lr=1e-3']. `--help` prints the script's docstring and config block, and exits.
    Returns: sources, a dict {key: (default, where the value came from)} of the changed keys, for `describe`.
    Raises: UserError with every mistake at once, each with its source and the nearest key.
    """
    if any(arg in ("--help", "-h") for arg in argv):
        source = open(namespace["__file__"]).read()
        block = source.split("# ==== config", 1)[1].split("\n", 1)[1].split("config_keys =", 1)[0]
        print((namespace["__doc__"] or "").strip() + "\n\nConfig keys, their defaults and meaning "
              "(change them in a config file or with --key=value):\n" + block.rstrip())
        sys.exit(0)
    defaults, sources, errors = {key: namespace[key] for key in keys}, {}, []

    def assign(key, value, source):
        if key not in defaults:
            return errors.append(f"{source}: {_unknown(key, keys)}")
        try:
            value = _coerce(value, defaults[key])
        except (TypeError, OverflowError, ValueError) as error:
            return errors.append(f"{source}: {key} = {value!r} ({type(value).__name__}), needs {error}")
        if value != namespace[key]:
            namespace[key], sources[key] = value, (defaults[key], source)

    for arg in [arg for arg in argv if not arg.startswith("--")]:
        try:
            for key, value in _run_file(arg, {key: namespace[key] for key in keys}).items():
                assign(key, value, arg)
        except UserError as error:
            errors.append(str(error))
    for arg in [arg for arg in argv if arg.startswith("--")]:
        flag, equals, text = arg[2:].partition("=")
        key = _flag_key(flag, keys)
        if not equals and key in defaults:
            errors.append(f"command line: {arg} has no value, write --{key}=VALUE like --{key}={defaults[key]}")
        else:
            assign(key, _parse(text, defaults.get(key)), "command line")
    if errors:
        raise UserError("\n       ".join(errors))
    return sources


def describe(namespace, keys, sources):
    """The resolved config as text: one key a line, `*` before the changed ones with their default and their source."""
    width = max(len(key) for key in keys)
    return "\n".join(f"{'*' if key in sources else ' '} {key:{width}} = {namespace[key]!r}"
                     + ("   (default {!r}, from {})".format(*sources[key]) if key in sources else "") for key in keys)


def dump(namespace, keys):
    """The resolved config as a runnable config file."""
    return "".join(f"{key} = {namespace[key]!r}\n" for key in keys)
