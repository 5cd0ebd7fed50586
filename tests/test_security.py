"""Nothing from outside is executed or leaves its folder: files, recipes, names, archives.
(Pictures: tests/data/test_images.py.)"""

import ast
import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from small_runs import tree

from uno_ds.data.files import UnreadableFile, open_rows
from uno_ds.model.tensor_file import TensorFile
from uno_ds.recipe import Recipe, load_recipe
from uno_ds.settings import SettingsError, build

ROOT = Path(__file__).parent.parent
PROGRAM = [
    path
    for folder in ("uno_ds", "kernels", "scripts", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
]
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.system",
    "np.load",
    "numpy.load",
}


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


@pytest.mark.parametrize("path", PROGRAM, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_program_reads_no_pickle_and_runs_no_text(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN_MODULES
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in FORBIDDEN_MODULES
        elif isinstance(node, ast.Call):
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            assert called(node) not in FORBIDDEN_CALLS, called(node)
            assert called(node) != "torch.load" or options.get("weights_only") == "True"
            assert (
                options.get("trust_remote_code", "False") == "False"
                and options.get("shell", "False") == "False"
            )


def test_a_recipe_is_data_and_its_tags_are_not_obeyed(tmp_path: Path):
    target = tmp_path / "written"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: !!python/object/apply:os.system ['touch {target}']\nsteps: 1\n")
    with pytest.raises(SettingsError, match="not readable YAML"):
        load_recipe(str(recipe))
    with pytest.raises(SettingsError, match="steps"):
        load_recipe("tiny", [f"steps=!!python/object/apply:os.system ['touch {target}']"])
    assert not target.exists()


@pytest.mark.parametrize(
    "name", ["../up", "/tmp/x", "a/b", "..", ".hidden", "", "a\\..\\b/", "a\nb", "a" * 101]
)
def test_a_run_name_that_leaves_the_folder_of_runs_is_refused(tmp_path: Path, name: str):
    with pytest.raises(SettingsError, match="^name: "):
        build(Recipe, tree(tmp_path, ["scenes/t2i"], name=name))


@pytest.mark.parametrize("name", ["../../escape.png", "/etc/escape.png", "a/../../escape.png"])
def test_an_archive_whose_members_lead_out_of_it_is_refused_and_nothing_is_unpacked(
    tmp_path: Path, name: str
):
    path = tmp_path / "in" / "shard.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo(name)
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    with pytest.raises(UnreadableFile, match="points out of the archive"):
        open_rows(path)
    assert sorted(found.name for found in tmp_path.rglob("*")) == ["in", "shard.tar"]


def test_links_in_an_archive_are_not_followed(tmp_path: Path):
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as archive:
        for kind, target in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "/etc/passwd")):
            member = tarfile.TarInfo(f"{kind.decode()}.txt")
            member.type, member.linkname = kind, target
            archive.addfile(member)
    assert len(open_rows(path)) == 0


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04K\x01.",
        b"\xff" * 64,
        (2**63).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        *(
            (len(text)).to_bytes(8, "little") + text
            for text in (
                json.dumps(
                    {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
                ).encode(),
                json.dumps(
                    {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}
                ).encode(),
                json.dumps(
                    {"a": {"dtype": "object", "shape": [], "data_offsets": [0, 0]}}
                ).encode(),
                b"{" * 50_000,
            )
        ),
    ],
)
def test_a_weights_file_that_is_none_is_one_line(tmp_path: Path, content: bytes):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(
        SettingsError, match="model.safetensors: is not a readable safetensors file"
    ) as refused:
        TensorFile(path)
    assert len(str(refused.value).splitlines()) == 1


def test_a_pickle_is_no_checkpoint(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(SettingsError, match="is not a readable safetensors file"):
        TensorFile(path)
