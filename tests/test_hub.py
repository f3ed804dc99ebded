"""Pushes of real runs to a Hub on loopback, over real HTTP, and what fresh processes can load from each commit."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import torch
import yaml
from conftest import BLOCK_PACKAGE
from loopback_hub import LoopbackHub
from tiny_language import write_language_model
from tiny_recipes import (
    PROBES,
    ROOT,
    SYNTHETIC,
    encode,
    log_of,
    picture,
    write_parquet,
    write_recipe,
    write_task_recipe,
)
from transformers import AutoImageProcessor

from modeling_ehm import EHMConfig, EHMModel
from modeling_ehm.training.hub import _describe_masks

TOKEN, REPO = "hf_loopbacksecret", "alice/tiny"
CODE = {"configuration_ehm.py", "hierarchy_ehm.py", "masking_ehm.py", "mask_policies_ehm.py", "modeling_ehm.py"}
PUSHING = {"push_to_hub": True, "hub_model_id": REPO, "hub_strategy": "every_save", "hub_private_repo": True}
SAVING = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}

# Refusals first: they must leave nothing behind that a later load could use.
LOAD_EACH_COMMIT = (
    BLOCK_PACKAGE
    + """
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining
torch.set_num_threads(1)
repo, image, target, *shas = sys.argv[1:]
for auto in (AutoModel, AutoModelForPreTraining):
    for trust in ({}, {"trust_remote_code": False}):
        try:
            auto.from_pretrained(repo, revision=shas[-1], **trust)
        except ValueError as error:
            assert "trust_remote_code" in str(error), error
        else:
            raise SystemExit("code of the repository ran although nobody allowed it")
assert not [name for name in sys.modules if "tiny" in name and name.startswith("transformers_modules")]
features = {}
for sha in shas:
    allowed = {"revision": sha, "trust_remote_code": True}
    processor = AutoImageProcessor.from_pretrained(repo, revision=sha)
    encoder = AutoModel.from_pretrained(repo, **allowed)
    whole = AutoModelForPreTraining.from_pretrained(repo, **allowed)
    assert (type(encoder).__name__, type(whole).__name__) == ("EHMModel", "EHMForPreTraining")
    assert sha in type(encoder).__module__ and sha in type(whole).__module__
    inputs = processor(Image.open(image), return_tensors="pt")
    with torch.no_grad():
        features[sha] = encoder.eval()(**inputs).pooler_output
        assert torch.equal(whole.ehm.eval()(**inputs).pooler_output, features[sha])
torch.save(features, target)
"""
)

LOAD_WITH_PACKAGE = """
import sys
import modeling_ehm
from transformers import AutoModel, AutoModelForPreTraining
repo, sha = sys.argv[1:]
assert type(AutoModel.from_pretrained(repo, revision=sha)) is modeling_ehm.EHMModel
assert type(AutoModelForPreTraining.from_pretrained(repo, revision=sha)) is modeling_ehm.EHMForPreTraining
assert not [name for name in sys.modules if name.startswith("transformers_modules")]
"""


def client(hub, folder, *arguments, token=TOKEN):
    """A fresh interpreter with an empty HF_HOME and no terminal; `arguments` follow `python`."""
    environment = hub.env(token, folder / "home") | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )


def train(hub, folder, **training):
    """Run train_ehm.py on a tiny recipe with probes; saves and pushes after each of 2 steps."""
    settings = {**PUSHING, **SAVING, "eval_strategy": "steps", "eval_steps": 1, "num_gallery_images": 2, **training}
    folder.mkdir()
    return client(
        hub, folder, ROOT / "train_ehm.py", write_recipe(folder / "recipe.yaml", data=PROBES, training=settings)
    )


def text_of_everything(hub, run) -> bytes:
    """All that the Hub received and logged, all that the run wrote, and what it printed."""
    files = [path for root in (hub.root, run.folder) for path in root.rglob("*") if path.is_file()]
    printed = run.done.stdout + run.done.stderr + repr(hub.log)
    return printed.encode() + b"".join(path.read_bytes() for path in files)


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A finished run with two saves and the Hub that it pushed to."""
    folder = tmp_path_factory.mktemp("hub")
    with LoopbackHub(folder / "hub", {TOKEN: "alice", "hf_otherssecret": "bob"}) as hub:
        done = train(hub, folder / "run")
        assert done.returncode == 0, done.stderr
        commits = [commit for commit in hub.commits(REPO) if "config.json" in commit.files]
        yield SimpleNamespace(hub=hub, folder=folder / "run", out=folder / "run" / "out", done=done, commits=commits)
        assert hub.leaks() == []


def test_every_commit_loads_where_the_package_is_missing(pushed, tmp_path):
    """Model, pre-training model and processor of each commit, by its sha; the last gives the local model's features."""
    image = tmp_path / "image.png"
    picture(120, 50, 40).save(image)
    shas = [commit.sha for commit in pushed.commits]
    assert len(shas) >= 3  # two saves, and the end with its pictures
    done = client(pushed.hub, tmp_path / "there", "-c", LOAD_EACH_COMMIT, REPO, image, tmp_path / "features.pt", *shas)
    assert done.returncode == 0, done.stderr
    features = torch.load(tmp_path / "features.pt")
    inputs = AutoImageProcessor.from_pretrained(pushed.out)(picture(120, 50, 40), return_tensors="pt")
    with torch.no_grad():
        local = EHMModel.from_pretrained(pushed.out).eval()(**inputs).pooler_output
    assert torch.equal(features[shas[-1]], local) and not torch.equal(features[shas[0]], local)


def test_the_package_makes_remote_code_needless(pushed, tmp_path):
    """With `modeling_ehm` imported, nothing has to be trusted and no code of the repository is used."""
    done = client(pushed.hub, tmp_path / "there", "-c", LOAD_WITH_PACKAGE, REPO, pushed.commits[-1].sha)
    assert done.returncode == 0, done.stderr


def test_each_commit_is_the_checkpoint_it_names(pushed):
    """The commit of a step holds the bytes of that step's checkpoint, although training went on."""
    steps = [re.fullmatch("Training in progress, step ([12])", commit.summary) for commit in pushed.commits]
    assert [match[1] for match in steps if match] == ["1", "2"]
    for commit, match in zip(pushed.commits, steps, strict=True):
        local = pushed.out / f"checkpoint-{match[1]}" if match else pushed.out
        for name in ("model.safetensors", "config.json", *CODE):
            assert pushed.hub.read(REPO, name, commit.sha) == (local / name).read_bytes(), (commit.summary, name)


def test_only_what_belongs_to_a_model_is_pushed(pushed):
    """No pickle, no optimiser, no state, no checkpoint folders, in no commit; code and processor in each."""
    for commit in pushed.commits:
        names = set(commit.files)
        assert CODE | {"model.safetensors", "config.json", "preprocessor_config.json", "README.md"} <= names
        assert not [n for n in names if n.endswith((".bin", ".pt", ".pth", ".pkl", ".npz", ".jsonl")) or "/" in n]
        assert not names & {"trainer_state.json", "ema_teacher.safetensors", "run.json"}
        assert all(
            (ROOT / "modeling_ehm" / name).read_bytes() == pushed.hub.read(REPO, name, commit.sha) for name in CODE
        )
    for name in ("gallery.png", "curves.png"):  # of the last commit
        assert pushed.hub.read(REPO, name) == (pushed.out / name).read_bytes()


def test_the_card_tells_recipe_data_figures_and_hashes(pushed):
    """Each commit's card parses, and what it says is what the commit and the run hold."""
    for commit in pushed.commits:
        card = pushed.hub.read(REPO, "README.md", commit.sha).decode()
        front, _, body = card.removeprefix("---\n").partition("\n---\n")
        assert yaml.safe_load(front)["library_name"] == "transformers"
        assert "{" not in re.sub("```.*?```", "", body, flags=re.DOTALL)  # no field of the template is left
        settings = yaml.safe_load(re.search("```yaml\n(.*?)```", body, re.DOTALL)[1])
        recipe = yaml.safe_load((pushed.folder / "recipe.yaml").read_text())
        assert settings["model"] == recipe["model"] and settings["training"]["base_learning_rate"] == 0.032
        assert "Recipe `recipe.yaml`" in body and "- Data: synthetic, split train. No image was skipped." in body
        hashes = dict(re.findall(r"^\| (\S+) \| `([0-9a-f]{64})` \|$", body, re.MULTILINE))
        assert set(hashes) == CODE | {"model.safetensors", "config.json"}
        for name, digest in hashes.items():
            assert hashlib.sha256(pushed.hub.read(REPO, name, commit.sha)).hexdigest() == digest, name
    assert "Steps: 2 of 2" in body
    last = [row for row in log_of(pushed.out) if "eval_knn" in row][-1]
    assert re.search(rf"^\| knn \| [0-9.]+ \| .* \| {last['eval_knn']:.3f} \(step 2\) \|$", body, re.MULTILINE)


def test_the_card_describes_the_masks():
    evolved = _describe_masks(EHMConfig(num_nodes_end=20, evolution_start=0.5, affinity_layers=[1]))
    assert "ratio 0.75: 196 to 20 nodes of 196 patches (linear in progress from 0.5 on), softness 0.0 to 0.0" in evolved
    assert "average linkage over attention of layers [1], online teacher" in evolved
    default = _describe_masks(EHMConfig())
    assert " on)" not in default and "attention of layers [1]," in default
    assert _describe_masks(EHMConfig(mask_policy="random")) == "random masks (as MAE), ratio 0.75"


def test_the_card_does_not_tell_where_it_was_trained(pushed):
    """Folders of the machine are nobody's business: no absolute path in any card."""
    for commit in pushed.commits:
        card = pushed.hub.read(REPO, "README.md", commit.sha).decode()
        assert str(pushed.folder) not in card


def test_the_repository_is_private(pushed):
    """As asked for: without a token there is nothing to see."""
    for path in (f"/api/models/{REPO}", f"/{REPO}/resolve/main/config.json"):
        with pytest.raises(HTTPError) as refused:
            urlopen(pushed.hub.url + path)
        assert refused.value.code == 401


def test_the_token_is_nowhere(pushed):
    """Not in what the Hub received, not in the output folder, not in what was printed; nor sent to another origin."""
    everything = text_of_everything(pushed.hub, pushed)
    assert b"safetensors" in everything and TOKEN.encode() not in everything
    assert pushed.hub.leaks() == [] and any(record.authorized for record in pushed.hub.log)


def test_a_task_starts_from_a_hub_id_and_pushes_what_it_made(pushed, tmp_path):
    """Fine-tuned from the pushed checkpoint by its id; the pushed classifier answers where the package is missing."""
    data = {name: SYNTHETIC | {"max_images": 8, "label_column": "label"} for name in ("train", "test")}
    training = PUSHING | {"hub_model_id": "alice/classifier", "hub_strategy": "end"}
    recipe = write_task_recipe(tmp_path / "run" / "recipe.yaml", "classify", REPO, data, training)
    done = client(pushed.hub, tmp_path / "run", ROOT / "train_ehm.py", recipe)
    assert done.returncode == 0, done.stderr
    card = pushed.hub.read("alice/classifier", "README.md").decode()
    assert f"It started from `{REPO}`" in card and str(tmp_path) not in card
    picture(7, 50, 40).save(tmp_path / "image.png")
    program = """
from transformers import pipeline
classify = pipeline("image-classification", model="alice/classifier", revision=sys.argv[2], trust_remote_code=True)
print(len(classify(sys.argv[1], top_k=20)))
"""
    sha = pushed.hub.commits("alice/classifier")[-1].sha
    done = client(pushed.hub, tmp_path / "there", "-c", BLOCK_PACKAGE + program, tmp_path / "image.png", sha)
    assert done.returncode == 0 and done.stdout.split() == ["10"], done.stderr


def test_an_aligned_model_is_pushed_whole(pushed, tmp_path):
    """Aligned from the pushed checkpoint by its id; every commit answers as the run did, and holds no code to trust."""
    encoded = [encode(picture(30 * number)) for number in range(8)]
    files = write_parquet(tmp_path / "rows.parquet", encoded, name=["red", "green"] * 4)
    source = {"path": "parquet", "data_files": files, "text_column": "name"}
    data = {"train": source, "test": source, "templates": ["it is {}."]}
    training = PUSHING | SAVING | {"hub_model_id": "alice/aligned"}
    head = {"language_model": str(write_language_model(tmp_path / "language")), "language_model_training": "full"}
    head |= {"max_new_tokens": 8}
    recipe = write_task_recipe(tmp_path / "run" / "recipe.yaml", "align", REPO, data, training, head=head)
    done = client(pushed.hub, tmp_path / "run", ROOT / "train_ehm.py", recipe)
    assert done.returncode == 0, done.stderr
    commits = [commit for commit in pushed.hub.commits("alice/aligned") if "config.json" in commit.files]
    assert len(commits) >= 3  # two saves, and the end
    for commit in commits:
        names = set(commit.files)
        expected = {"model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json", "README.md"}
        assert expected | {"processor_config.json"} <= names
        assert not [name for name in names if name.endswith((".py", ".bin", ".pt", ".jsonl")) or "/" in name]
        card = pushed.hub.read("alice/aligned", "README.md", commit.sha).decode()
        assert f"`{REPO}`" in card and str(tmp_path) not in card
    program = """
import json
from transformers import pipeline
answers = {}
for sha in sys.argv[2:]:
    pipe = pipeline("image-text-to-text", model="alice/aligned", revision=sha)
    content = [{"type": "image", "url": sys.argv[1]}, {"type": "text", "text": "Describe the image."}]
    options = {"max_new_tokens": 8, "do_sample": False}
    said = pipe(text=[{"role": "user", "content": content}], return_full_text=False, generate_kwargs=options)
    answers[sha] = said[0]["generated_text"].strip()
print(json.dumps(answers))
"""
    (tmp_path / "image.png").write_bytes(encoded[0])
    shas = [commit.sha for commit in commits]
    done = client(pushed.hub, tmp_path / "there", "-c", BLOCK_PACKAGE + program, tmp_path / "image.png", *shas)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "run" / "out" / "answers.jsonl").read_text().splitlines()[0])["answer"]
    assert json.loads(done.stdout.splitlines()[-1])[shas[-1]] == told != ""


def test_a_hub_that_is_down_in_between_does_not_end_the_run(tmp_path):
    """The first push in training meets a 503 at all its tries: told on the console and in a file; the others pass."""
    with LoopbackHub(tmp_path / "hub", {TOKEN: "alice"}) as hub:
        refused = hub.fault("POST .*/commit/", status=503, times=4)
        done = train(hub, tmp_path / "run", eval_strategy="no")
        out = tmp_path / "run" / "out"
        assert done.returncode == 0 and refused.hits == 4, done.stderr
        assert f"push of step 1 to {REPO} failed" in done.stderr and "503" in done.stderr
        told = [json.loads(line) for line in (out / "failed_pushes.jsonl").read_text().splitlines()]
        assert [line["what"] for line in told] == ["step 1"] and "503" in told[0]["error"]
        for step in (1, 2):
            assert_complete(out / f"checkpoint-{step}", step)
        summaries = [commit.summary for commit in hub.commits(REPO)[1:]]
        assert summaries[0] == "Training in progress, step 2" and len(summaries) == 2
        assert hub.read(REPO, "model.safetensors") == (out / "model.safetensors").read_bytes()
        assert TOKEN.encode() not in text_of_everything(hub, SimpleNamespace(folder=tmp_path / "run", done=done))
        assert hub.leaks() == []


@pytest.mark.parametrize(("state", "required"), [("gone", True), ("refuses", False), ("hangs", False)])
def test_a_hub_that_stays_away_costs_nothing_but_the_push(tmp_path, state, required):
    """Gone from the start, refusing all, or hanging at each upload: all is there, told, and an exit code on request."""
    settings = {"hub_strategy": "end"} if state != "hangs" else {"push_timeout": 6}
    settings |= {"require_push": True} if required else {}
    with LoopbackHub(tmp_path / "hub", {TOKEN: "alice"}) as hub:
        if state == "gone":
            hub.url = "http://127.0.0.1:9"
        elif state == "refuses":
            hub.fault("POST .*/commit/", status=507, times=-1)
        else:
            hub.fault("PUT /upload/", delay=100, times=-1)
        done = train(hub, tmp_path / "run", eval_strategy="no", **settings)
        out = tmp_path / "run" / "out"
        for step in (1, 2):
            assert_complete(out / f"checkpoint-{step}", step)
        assert (out / "model.safetensors").exists() and json.loads((out / "results.json").read_text())["steps"] == 2
        told = [json.loads(line)["what"] for line in (out / "failed_pushes.jsonl").read_text().splitlines()]
        assert told == (["step 1", "step 2"] if state == "hangs" else []) + ["the final model"]
        lines = done.stderr.strip().splitlines()
        assert done.returncode == int(required) and "Traceback" not in done.stderr, done.stderr
        way_out = f"push it with: python -m modeling_ehm.training.push {out} {REPO}"
        assert way_out in done.stderr and (way_out in lines[-1] and lines[-1].startswith("error: ")) == required


def test_a_streamed_dataset_that_breaks_off_is_read_on(tmp_path):
    """Reads that are refused, cut or slow, which the client tries again: the losses of a stream without disturbance."""
    folder = tmp_path / "dataset" / "data"
    folder.mkdir(parents=True)
    for shard in range(2):
        encoded = [encode(picture(10 * shard + number, 200, 150)) for number in range(9)]
        write_parquet(folder / f"train-0000{shard}-of-00002.parquet", encoded)
    upload = "from huggingface_hub import HfApi; api = HfApi(); api.create_repo('alice/data', repo_type='dataset');"
    upload += f"api.upload_folder(repo_id='alice/data', repo_type='dataset', folder_path={str(folder.parent)!r})"
    losses = {}
    for name in ("whole", "broken"):
        with LoopbackHub(tmp_path / f"hub-{name}", {TOKEN: "alice"}) as hub:
            assert client(hub, tmp_path / f"upload-{name}", "-c", upload).returncode == 0
            if name == "broken":
                struck = [hub.fault("GET /storage/", status=500, times=2, skip=2)]
                struck.append(hub.fault("GET /storage/", cut_download=2000, rst=True, skip=3))
                struck.append(hub.fault("GET /storage/", delay=3, skip=1))
            (tmp_path / name).mkdir()
            data = {"train": {"path": "alice/data", "streaming": True}, "shuffle_window": 4}
            recipe = write_recipe(tmp_path / name / "recipe.yaml", data=data, training={"max_steps": 6})
            done = client(hub, tmp_path / name, ROOT / "train_ehm.py", recipe)
            assert done.returncode == 0, done.stderr
            assert hub.leaks() == []
        losses[name] = [row["loss"] for row in log_of(tmp_path / name / "out") if "loss" in row]
    assert [fault.hits for fault in struck] == [2, 1, 1]
    assert losses["broken"] == losses["whole"] and len(losses["whole"]) == 6


def assert_complete(checkpoint: Path, step: int) -> None:
    names = {path.name for path in checkpoint.iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "README.md",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
    } | CODE <= names
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == step
    EHMModel.from_pretrained(checkpoint)
