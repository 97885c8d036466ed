"""export.py, and what an outsider does with an export: in a process that cannot import this
repository, with and without torchvision."""
import base64
import http.server
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import preprocess as template
from card import CANNOT_CLIP, model_card
from checkpoint import export_hf
from configurator import UserError
from data import Dataset
from features import extract_features
from model import FAMILIES, build_backbone, forward_features, set_channels
from tests_support import ROOT, TINY, load_script, run, state
from weights import pretrained_input

SIZE = 32
KINDS = {  # intensity_range, mean, std; the number of channels is that of mean
    "rgb": ((0, 255), (0.5, 0.4, 0.6), (0.2, 0.25, 0.3)),
    "grey": ((0, 255), (0.4,), (0.25,)),
    "ct": ((-200.0, 300.0), (0.3,), (0.2,)),
    "five": ((-200.0, 300.0), (0.3,) * 5, (0.2,) * 5),
    "part": ((20, 200), (0.4,), (0.25,)),  # of 8 bits
    "deep": ((0, 65535), (0.4,), (0.25,))}  # 16 bits without a sign
DTYPES = dict(rgb=np.uint8, grey=np.uint8, part=np.uint8, deep=np.uint16, ct=np.int16,
              five=np.float32)


def image_of(kind, height=50, width=71):
    """An image [H,W,C] that is no square and has not the network's size; CT leaves its window."""
    rng, shape = np.random.default_rng(3), (height, width, len(KINDS[kind][1]))
    low, high = dict(ct=(-1000, 1500), five=(-1000, 1500), deep=(0, 65536)).get(kind, (0, 256))
    return rng.integers(low, high, shape).astype(DTYPES[kind])


def evaluated(network, kind, image, scaling="set"):
    """What evaluate.extract_features gives for one image [H,W,C] of a kind, [1,D]."""
    value_range, mean, std = KINDS[kind]
    return extract_features(network, Dataset(image[None], scaling=scaling), size=SIZE,
                            intensity_range=value_range, mean=mean, std=std)[0]


def export(folder, network, kind, **more):
    """Export a network for a kind of images, as a run does; returns the folder's name."""
    value_range, mean, std = KINDS[kind]
    card = model_card("x", 4, {}, dict(use_pretrained=False, model_type="vit", max_iterations=4,
                                       dataset_path="d"), "", len(mean), value_range, **more)
    export_hf(str(folder), network, SIZE, value_range, mean, std, card, **more)
    return str(folder)


# ---- preprocess.py ----

def preprocess_of(folder, image):
    """preprocess(image) of the file in an export."""
    source = Path(folder, "preprocess.py").read_text()
    namespace = dict(__file__=os.path.join(folder, "preprocess.py"))
    exec(compile(source, "preprocess.py", "exec"), namespace)
    return namespace["preprocess"](image)


def test_preprocess_is_short_and_needs_three_packages():
    source = Path(template.__file__).read_text()
    assert source.count("\n") < 40
    assert set(re.findall(r"^(?:import|from) (\w+)", source, re.M)) == {
        "json", "pathlib", "numpy", "torch", "PIL"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("height, width", [(50, 71), (20, 21), (32, 32), (97, 40)])
def test_preprocess_gives_the_features_of_evaluate(tiny_backbone, tmp_path, kind, height, width):
    network = tiny_backbone("dinov2", len(KINDS[kind][1])).eval()
    folder, image = export(tmp_path / "hf", network, kind), image_of(kind, height, width)
    pixels = preprocess_of(folder, image)
    with torch.no_grad():
        found = forward_features(network, pixels)[0]
    torch.testing.assert_close(found, evaluated(network, kind, image), rtol=1e-5, atol=1e-5)
    if image.shape[2] == 1:
        flat = preprocess_of(folder, image[..., 0])
        assert torch.equal(flat, pixels)
    if image.dtype == np.uint8:  # as a file
        Image.fromarray(image.squeeze()).save(tmp_path / "a.png")
        for given in (str(tmp_path / "a.png"), tmp_path / "a.png",
                      Image.open(tmp_path / "a.png")):
            assert torch.equal(preprocess_of(folder, given), pixels)


@pytest.mark.parametrize("kind, image, message", [
    ("ct", np.zeros((40, 40), np.uint8), "needs intensities, of which -200.0..300.0 are seen"),
    ("rgb", np.full((40, 40), 300, np.int16), "needs a picture of 8 bits"),
    ("grey", np.full((40, 40), -1, np.int16), "needs a picture of 8 bits"),
    ("grey", np.full((40, 40), 0.5, np.float32), "needs a picture of 8 bits"),
    ("rgb", np.zeros((40, 40, 4), np.uint8), r"needs \[H,W\] or \[H,W,3\]"),
    ("five", np.zeros((40, 40, 3), np.float32), r"needs \[H,W\] or \[H,W,5\]"),
    ("grey", np.zeros((40, 40, 3), np.uint8), r"needs \[H,W\] or \[H,W,1\]")])
def test_images_that_the_network_has_not_seen_are_refused(tiny_backbone, tmp_path, kind, image,
                                                          message):
    network = tiny_backbone("dinov2", len(KINDS[kind][1]))
    folder = export(tmp_path / "hf", network, kind)
    with pytest.raises(ValueError, match=message):
        preprocess_of(folder, image)


@pytest.mark.parametrize("scaling", ["image", "dtype"])
def test_the_card_scales_each_image_by_itself(tiny_backbone, tmp_path, monkeypatch, scaling):
    """As intensity_scaling did in training; preprocess.py refuses what is not scaled."""
    monkeypatch.setitem(KINDS, "deep", ((0.0, 1.0), (0.4,), (0.25,)))
    monkeypatch.chdir(tmp_path)
    network, image = tiny_backbone("dinov2", 1).eval(), image_of("deep")
    folder = export(tmp_path / "hf", network, "deep", intensity_scaling=scaling)
    np.save("image.npy", image[..., 0])
    [snippet] = re.findall("```python\n(import.*?)```", Path(folder, "README.md").read_text(), re.S)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "preprocess")
    scope = {}
    exec(snippet.replace('"FOLDER"', repr(folder)), scope)
    sys.modules.pop("preprocess")
    expected = evaluated(network, "deep", image, scaling)
    torch.testing.assert_close(scope["features"], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="needs numbers in 0..1, scaled as the README says"):
        preprocess_of(folder, image)


# ---- an outsider ----

OUTSIDER = """
import contextlib, io, json, os, re, sys
import numpy as np
if sys.argv[1] == "none":
    sys.modules["torchvision"] = None
import torch
assert not any(os.path.isfile(os.path.join(path, "train.py")) for path in sys.path if path)
from transformers import AutoImageProcessor, AutoModel, pipeline
from transformers.utils import is_torchvision_available
assert is_torchvision_available() == (sys.argv[1] == "torchvision")
result = {}
for name in json.load(open("names.json")):
    os.chdir(name)
    readme = open("hf/README.md").read()
    for i, snippet in enumerate(re.findall("```python\\n(import.*?|from.*?)```", readme, re.S)):
        sys.modules.pop("preprocess", None)
        sys.path[:] = [path for path in sys.path if not path.endswith("/hf")]
        scope = {}
        exec(snippet.replace('"FOLDER"', repr(os.path.abspath("hf"))), scope)
        result[f"{name} {i}"] = scope["features"].tolist()
    image = np.load("image.npy")
    try:
        processor = AutoImageProcessor.from_pretrained("hf")
        with torch.no_grad():
            output = AutoModel.from_pretrained("hf")(**processor(image, return_tensors="pt"))
        result[f"{name} processor"] = output.last_hidden_state[:, 0].tolist()
    except Exception as error:
        result[f"{name} processor"] = str(error)
    os.chdir("..")
json.dump(result, open(f"{sys.argv[1]}.json", "w"))
"""


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """A folder with an export for each family and kind of image, and the images of outsiders;
    {name: features that evaluate.py measures}; {name: those of the image at the network's size}."""
    root, expected, native = tmp_path_factory.mktemp("exports"), {}, {}
    torch.manual_seed(0)
    for family in FAMILIES:
        for kind in ("rgb", "grey", "ct"):
            name, channels = f"{family}-{kind}", len(KINDS[kind][1])
            network = build_backbone(family, False, channels, **TINY).eval()
            with torch.no_grad():
                for param in network.parameters():
                    param.add_(0.1 * torch.randn_like(param))
            (root / name).mkdir()
            export(root / name / "hf", network, kind)
            image = image_of(kind)
            np.save(root / name / "image.npy", image_of(kind, SIZE, SIZE))
            if kind != "ct":
                Image.fromarray(image.squeeze()).save(root / name / "picture.png")
            else:
                np.save(root / name / "image.npy", image)
            expected[name] = evaluated(network, kind, image)
            native[name] = evaluated(network, kind, image_of(kind, SIZE, SIZE))
    (root / "names.json").write_text(json.dumps(list(expected)))
    return root, expected, native


@pytest.mark.parametrize("torchvision", ["torchvision", "none"])
def test_an_outsider_gets_the_features_of_evaluate(exports, torchvision):
    """Four families, RGB and grey pictures and CT whose values leave the window, at another size
    than the network's. The card's snippets are run as they are. AutoImageProcessor makes the pixels
    of 8-bit pictures, and refuses CT."""
    if torchvision == "torchvision":
        pytest.importorskip("torchvision")
    root, expected, native = exports
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", OUTSIDER, torchvision], cwd=root,
                          capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((root / f"{torchvision}.json").read_text())
    for name, features in expected.items():
        torch.testing.assert_close(torch.tensor(found[f"{name} 0"]), features, rtol=1e-4, atol=1e-4)
        by_processor = found[f"{name} processor"]
        if name.endswith("-ct"):
            assert by_processor == f"Could not convert size input to size dict: {CANNOT_CLIP}"
            assert f"{name} 1" not in found
        else:
            torch.testing.assert_close(torch.tensor(by_processor), native[name], rtol=1e-4,
                                       atol=1e-4)
        if name.endswith("-rgb"):  # a pipeline, of a picture that is no square: near, not equal
            pair = torch.tensor(found[f"{name} 1"]), features
            assert pair[0].shape == features.shape
            assert torch.cosine_similarity(*pair).item() > 0.9


# ---- export.py ----

def call(*argv):
    """Run export.py as from the command line, in this process."""
    old = sys.argv
    sys.argv = ["export.py", *map(str, argv)]
    try:
        runpy.run_path(os.path.join(ROOT, "export.py"), run_name="__main__")
    finally:
        sys.argv = old


def stopped(*argv):
    """The one line with which export.py stops."""
    with pytest.raises(SystemExit) as end:
        call(*argv)
    assert "\n" not in str(end.value.code)
    return str(end.value.code)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, npz):
    """Two runs of one-channel CT, whose starts are gone: 'plain', and 'lora' on pretrained weights.
    """
    root = tmp_path_factory.mktemp("runs")
    common = (f"--dataset_path={npz}", "--max_iterations=3", "--saveckp_freq=2")
    run(f"{root}/plain", *common, "--model_type=dinov2")
    start = build_backbone("vit", False, 3, hidden_size=32, num_hidden_layers=2, image_size=64,
                           num_attention_heads=2, patch_size=8)
    start.save_pretrained(root / "start")
    run(f"{root}/lora", *common, "--use_pretrained=true", f"--model_type={root}/start",
        "--use_lora=true", "--hidden_size=384")
    shutil.rmtree(root / "start")
    return root


def features_of(folder, image):
    """Features of an export, as an outsider has them: preprocess.py and AutoModel."""
    model = transformers.AutoModel.from_pretrained(str(folder)).eval()
    with torch.no_grad():
        return model(pixel_values=preprocess_of(str(folder), image)).last_hidden_state[:, 0]


@pytest.mark.parametrize("name", ["plain", "lora"])
def test_every_kept_checkpoint_becomes_a_folder(runs, tmp_path, name):
    """That of the last one is the export of the run itself, file by file."""
    image, found = image_of("ct"), {}
    for checkpoint in ("best", "last", "0000002"):
        call(runs / name / "checkpoints" / checkpoint, f"--output={tmp_path}/{checkpoint}")
        found[checkpoint] = features_of(tmp_path / checkpoint, image)
    assert not torch.equal(found["last"], found["0000002"])
    for checkpoint in ("best", "last"):
        own = runs / name / "checkpoints" / checkpoint / "hf"
        torch.testing.assert_close(found[checkpoint], features_of(own, image), rtol=1e-5, atol=1e-5)
    for file in ("config.json", "preprocessor_config.json", "preprocess.py"):
        assert (own / file).read_text() == (tmp_path / "last" / file).read_text(), file
    card, own_card = (tmp_path / "last/README.md").read_text(), (own / "README.md").read_text()
    assert card == own_card and "after 3 of 3 iterations" in card
    assert "after 2 of 3" in (tmp_path / "0000002" / "README.md").read_text()
    assert (tmp_path / "last" / "adapter").is_dir() == (name == "lora")


def test_a_run_means_best_else_last_and_an_interrupted_one_has_last(runs, tmp_path, capsys):
    call(runs / "plain", f"--output={tmp_path}/a")
    assert "checkpoints/best is in" in capsys.readouterr().out
    last = tmp_path / "run" / "checkpoints" / "last"
    last.mkdir(parents=True)
    shutil.copy(runs / "plain/checkpoints/0000002/state.pt", last)  # of a run that was killed
    call(f"--model={tmp_path}/run", f"--output={tmp_path}/b")
    assert "iteration 2 of" in capsys.readouterr().out
    message = stopped(tmp_path / "run" / "checkpoints" / "best", f"--output={tmp_path}/c")
    assert "has no state.pt; give a run or one of its checkpoints" in message
    assert message.endswith("has last)")
    (last / "state.pt").write_bytes(b"broken")
    message = stopped(tmp_path / "run", f"--output={tmp_path}/c")
    assert message.startswith("error: model=") and "is damaged or no checkpoint of ours" in message
    assert not (tmp_path / "c").exists()


def test_a_checkpoint_of_before_takes_its_input_from_an_export_of_the_run(runs, tmp_path):
    saved, last = state(str(runs / "plain")), tmp_path / "old/checkpoints/last"
    del saved["inputs"], saved["architecture"]
    last.mkdir(parents=True)
    torch.save(saved, last / "state.pt")
    message = stopped(tmp_path / "old", f"--output={tmp_path}/hf")
    assert "does not hold its input, and the run has no export; resume the run" in message
    shutil.copytree(runs / "plain/checkpoints/best/hf", tmp_path / "old/checkpoints/best/hf")
    call(tmp_path / "old", f"--output={tmp_path}/hf")
    own, image = runs / "plain/checkpoints/last/hf", image_of("ct")
    torch.testing.assert_close(features_of(tmp_path / "hf", image), features_of(own, image))


def test_an_output_that_exists_is_kept(runs, tmp_path):
    out = tmp_path / "hf"
    call(runs / "lora", f"--output={out}")
    before = (out / "README.md").stat().st_mtime_ns
    assert "exists; --overwrite=true replaces it" in stopped(runs / "plain", f"--output={out}")
    assert (out / "README.md").stat().st_mtime_ns == before
    call(runs / "plain", f"--output={out}", "--overwrite=true")
    assert not (out / "adapter").exists()  # nothing of the earlier one is left
    assert sorted(os.listdir(tmp_path)) == ["hf"]
    (out / "notes.txt").write_text("")
    (tmp_path / "released").mkdir()
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        shutil.copy(out / name, tmp_path / "released")
    for name in ("hf", "released", "hf/notes.txt"):  # what the user has is never removed
        message = stopped(runs / "plain", f"--output={tmp_path}/{name}", "--overwrite=true")
        assert "exists and is no export, or has other files: name another" in message
    assert (out / "notes.txt").exists() and len(os.listdir(tmp_path / "released")) == 3
    assert "give both" in stopped(runs / "plain")


def test_the_adapter_has_a_card_of_its_own(runs, tmp_path):
    call(runs / "lora", f"--output={tmp_path}/hf")
    card = (tmp_path / "hf/adapter/README.md").read_text()
    settings = pretrained_input(str(tmp_path / "hf"))
    assert "base_model" not in card  # a path is no id
    for text in (f"base: {runs}/start", "rank 4, alpha 16",
                 "patch embedding: 1 channel(s); the filters of a base with another number",
                 "32 x 32 pixels", f"mean {settings['mean']}", "5-NN accuracy", "best:"):
        assert text in card, text


# ---- one channel as RGB ----

@pytest.mark.parametrize("family", FAMILIES)
def test_three_equal_channels_give_the_features_of_one(tiny_backbone, family):
    grey, rgb = tiny_backbone(family, 1).eval(), tiny_backbone(family, 1).eval()
    set_channels(rgb, 3)
    pixels = torch.randn(2, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = forward_features(grey, pixels)
        found = forward_features(rgb, pixels.expand(-1, 3, -1, -1))
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "lora"])
def test_a_pipeline_works_on_rgb_exports(runs, tmp_path, name):
    """The network is of CT: the picture shows its window in 0..255."""
    rgb, ct = str(tmp_path / "rgb"), str(tmp_path / "ct")
    call(runs / name, f"--output={rgb}", "--rgb=true")
    call(runs / name, f"--output={ct}")
    low, high = pretrained_input(ct)["intensity_range"]
    picture = image_of("grey", SIZE, SIZE)[..., 0]
    Image.fromarray(picture).save(tmp_path / "a.png")
    extract = transformers.pipeline("image-feature-extraction", model=rgb)
    found = extract(str(tmp_path / "a.png"), return_tensors=True)[:, 0]
    intensities = (picture / 255 * (high - low) + low).astype(np.float32)
    expected = features_of(ct, intensities)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features_of(rgb, picture), expected, rtol=1e-4, atol=1e-4)
    card = Path(rgb, "README.md").read_text()
    assert "pipeline_tag: image-feature-extraction" in card
    assert f"The pictures show the window {low}..{high}" in card
    assert "pipeline_tag" not in Path(ct, "README.md").read_text()
    # here it is what the one-channel export is: intensities, in any number of channels
    inputs = [pretrained_input(folder) for folder in (rgb, ct)]
    assert inputs[0]["intensity_range"] == inputs[1]["intensity_range"]
    assert inputs[0]["mean"] == pytest.approx(inputs[1]["mean"] * 3, abs=1e-6)
    one = build_backbone(rgb, num_channels=1).eval()
    with torch.no_grad():
        again = forward_features(one, preprocess_of(ct, intensities))[0]
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)
    assert "8-bit" not in stopped(rgb, f"--output={tmp_path}/x")


def test_rgb_of_three_channels_is_refused(tiny_backbone):
    inputs = dict(intensity_range=(0, 255), mean=(0.5,) * 3, std=(0.2,) * 3)
    with pytest.raises(UserError, match="rgb=true is for networks of one channel, and .* has 3"):
        load_script("export").to_rgb(tiny_backbone("vit", 3), inputs)


# ---- ONNX ----

@pytest.mark.parametrize("name", ["plain", "lora"])
def test_onnx_gives_the_features(runs, tmp_path, name):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    call(runs / name, f"--output={tmp_path}/hf", "--onnx=true")
    session = onnxruntime.InferenceSession(str(tmp_path / "hf" / "model.onnx"))
    images = [image_of("ct", 50, 71), image_of("ct", 33, 40), image_of("ct", 90, 64)]
    pixels = torch.cat([preprocess_of(str(tmp_path / "hf"), image) for image in images])
    cls, patches = session.run(["cls", "patches"], dict(pixel_values=pixels.numpy()))
    expected = torch.cat([features_of(tmp_path / "hf", image) for image in images])
    torch.testing.assert_close(torch.from_numpy(cls), expected, rtol=1e-4, atol=1e-4)
    assert patches.shape == (3, 16, 32)


def test_without_onnx_the_error_says_what_to_install(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    message = stopped(runs / "plain", f"--output={tmp_path}/hf", "--onnx=true")
    assert message.endswith("pip install onnx onnxscript onnxruntime")
    assert os.listdir(tmp_path) == []


# ---- the hub ----

HUB = "https://huggingface.co/me/phantom"


class FakeHub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks of a server when it uploads small files: create, preupload, commit.
    """
    received, denies = [], False

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer(dict(sha="0" * 40, siblings=[], id="me/phantom"))

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        self.received.append((self.path, self.headers.get("Authorization"), body))
        if self.denies and "preupload" in self.path:
            self.answer(dict(error=f"no: {self.headers.get('Authorization')}"), 403)
        elif "preupload" in self.path:
            files = [dict(path=file["path"], uploadMode="regular", shouldIgnore=False)
                     for file in json.loads(body)["files"]]
            self.answer(dict(files=files))
        elif "commit" in self.path:
            self.answer(dict(commitUrl=f"{HUB}/commit/1", commitOid="1" * 40))
        else:
            self.answer(dict(url=HUB, name="me/phantom", id="me/phantom"))

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A server in place of the hub, and a token."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(FakeHub, "received", [])
    import huggingface_hub
    endpoint = f"http://127.0.0.1:{server.server_port}"
    original = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi",
                        lambda: original(endpoint=endpoint, token="hf_SECRET"))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_SECRET")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield FakeHub
    server.shutdown()


def test_an_export_is_uploaded_with_its_card(runs, tmp_path, hub, capsys):
    call(runs / "plain", f"--output={tmp_path}/hf", "--push_to_hub=me/phantom")
    paths = [path for path, _, _ in hub.received]
    assert "create" in paths[0] and "/me/phantom/commit/" in paths[-1]
    assert {token for _, token, _ in hub.received} == {"Bearer hf_SECRET"}
    lines = [json.loads(line) for line in hub.received[-1][2].decode().splitlines()]
    sent = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines
            if line["key"] == "file"}
    assert set(sent) == {"README.md", "config.json", "model.safetensors", "preprocess.py",
                         "preprocessor_config.json"}
    for name, content in sent.items():
        assert content == (tmp_path / "hf" / name).read_bytes(), name
    printed = capsys.readouterr()
    assert "uploaded: https://huggingface.co/me/phantom/commit/1" in printed.out
    assert "hf_SECRET" not in printed.out + printed.err


def test_an_upload_that_fails_says_why_without_the_token(runs, tmp_path, hub, monkeypatch, capsys):
    monkeypatch.setattr(hub, "denies", True)
    message = stopped(runs / "plain", f"--output={tmp_path}/hf", "--push_to_hub=me/phantom")
    assert "push_to_hub='me/phantom'" in message and "403" in message
    printed = capsys.readouterr()
    assert "hf_SECRET" not in message + printed.out + printed.err
    assert f"The folder {tmp_path}/hf is complete" in message
    assert features_of(tmp_path / "hf", image_of("ct")).isfinite().all()
