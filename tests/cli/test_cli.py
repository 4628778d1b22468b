"""The command line: exit codes, one-line errors, what is printed."""

import json
import subprocess
import sys

import pytest
import torch

import condlr_ext
from condlr_ext.cli import commands, main
from condlr_ext.experiments import TrainConfig, report

pytestmark = pytest.mark.usefixtures("no_figures")

QUICK = ["--epochs", "2", "--attack-steps", "2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "deep" / "out"
    assert main(["train", "--run", "dense", "--run", "condlr:tau=0.1", "--out", str(out), *QUICK]) == 0
    return out


def failure(capsys, *argv):
    """The one line that a failing command prints on stderr."""
    assert main(list(argv)) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("condlr: error: ") and printed.err.count("\n") == 1 and not printed.out
    return printed.err


def test_train_prints_a_table(tmp_path, capsys):
    argv = ["train", "--run=condlr:tau=0,rank=2", "--batch_size=200", "--eps", "0.1", "0.2", "--seed", "3"]
    assert main([*argv, "--out", str(tmp_path), "--epochs", "1", "--attack_steps", "1"]) == 0
    printed = capsys.readouterr()
    assert "CondLR τ=0 rank 2" in printed.out and "2, 2" in printed.out and "max κ" in printed.out
    assert "1/1" in printed.err  # the bar
    settings, (row,) = report.read(tmp_path / "results.csv")
    assert (settings["batch_size"], settings["eps"], settings["seeds"]) == (200, [0.1, 0.2], [3])
    assert (row["run"], row["ranks"], row["seed"]) == ("condlr:tau=0.0,rank=2", "2/2", 3)


def test_evaluate_prints_the_numbers_of_the_run(trained, capsys):
    run = json.loads((trained / "condlr-tau0.1-budget0.27-seed0.json").read_text())
    path = str(trained / run["checkpoint"])
    assert main(["evaluate", path, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert {key: again[key] for key in run["robustness"]} == run["robustness"]
    assert main(["evaluate", path]) == 0
    printed = capsys.readouterr().out
    assert "condlr:tau=0.1,budget=0.27 on 540 test samples of digits" in printed
    for attack in ("fgsm", "fgsm64", "worst"):
        assert attack in printed and f"{100 * run['robustness'][attack][1]:.2f}" in printed
    assert "masked" in printed
    assert main(["evaluate", path, "--attacks", "apgd-ce", "--attack-steps", "2"]) == 0
    assert "apgd-ce" in capsys.readouterr().out
    assert main(["evaluate", path, "--eps", "0.4", "--attack-steps", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["eps"] == [0.4]
    assert main(["evaluate", path, "--attack-samples", "50", "--attack-steps", "1"]) == 0
    assert "on 50 of 540 test samples of digits" in capsys.readouterr().out


def test_inspect_prints_the_layers(trained, capsys):
    path = str(trained / "condlr-tau0.1-budget0.27-seed0.safetensors")
    assert main(["inspect", path]) == 0
    printed = capsys.readouterr().out
    for text in ("fc1", "256 x 64", "32", "fc2", "20", "head", "κ", "σ max", "batches of 32"):
        assert text in printed
    assert main(["inspect", path, "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert all(layer["kappa"] <= 1.1 * (1 + 1e-5) for layer in layers if layer["name"] != "head")
    assert [layer["route"] for layer in layers] == ["factorized", "factorized", None]
    assert main(["inspect", path, "--json", "--batch-size", "4096"]) == 0
    larger = json.loads(capsys.readouterr().out)["layers"]
    assert larger[1]["gain"] > layers[1]["gain"]  # the calls weigh less
    assert "batch_size must be >= 1, got 0" in failure(capsys, "inspect", path, "--batch-size", "0")


def test_info(capsys):
    assert main(["info"]) == 0
    assert torch.__version__ in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["torch"] == torch.__version__


def test_backend_is_chosen_for_the_command_and_given_back(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(commands, "info", lambda arguments: seen.append(condlr_ext.ops.current_backend()))
    before = condlr_ext.ops.current_backend()
    assert main(["info", "--backend", "reference"]) == 0
    assert seen == ["reference"] and condlr_ext.ops.current_backend() == before
    assert "got 'fast'" in failure(capsys, "info", "--backend", "fast")


def test_threads_are_chosen_for_the_command_and_given_back(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(commands, "train", lambda arguments: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    assert main(["train"]) == main(["train", "--threads", str(before + 1)]) == 0
    assert seen == [1, before + 1] and torch.get_num_threads() == before
    assert "--threads must be in 1..1024, got 0" in failure(capsys, "train", "--threads", "0")


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (
            ["train", "--epochs", "many"],
            "argument --epochs: invalid int value: 'many' (see condlr train --help)",
        ),
        (["train", "--epochs", "0"], "epochs must be >= 1, got 0"),
        (["train", "--run", "condlr:tau=-1"], "tau must be >= 0"),
        (
            ["train", "--data", "mnist", "--folder", "absent"],
            "the files of mnist are not in absent (there is no such folder)",
        ),
        (["train", "--data", "absent.npz"], "there is no file absent.npz"),
        (["train", "--data", __file__ + ".npz"], "there is no file"),
        (["train", "--eps", "-1"], "eps[0] must be >= 0, got -1.0"),
        (["train", "--run", "vanilla:rank=9999"], "rank must be in 1..min(m, n) = 64"),
        (["train", "--attacks", "foo"], "attacks[0] must be 'worst', 'fgsm', "),
        (["train", "--device", "foo"], "train: device must be one that is here, got 'foo'"),
        (["train", "--device", "meta"], "train: device must be one that is here, got 'meta'"),
        (["evaluate", "absent.safetensors", "--device", "foo"], "evaluate: device must be one that is here"),
        (["train", "--backend", "triton"], "backend 'triton' cannot serve"),
        (["evaluate", "absent.safetensors"], "cannot read absent.safetensors"),
        (["inspect", __file__], "cannot read"),
    ],
)
def test_user_errors_are_one_line_and_exit_2(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    assert message in failure(capsys, *argv)
    assert not list(tmp_path.iterdir())


def test_an_output_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in failure(capsys, "train", "--out", str(tmp_path / "file" / "out"))


@pytest.mark.parametrize("package", ["tqdm", "matplotlib", "sklearn"])
def test_a_missing_extra_says_how_to_install_it(package, tmp_path, capsys, monkeypatch):
    for module in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    message = failure(capsys, "train", "--out", str(tmp_path / "out"))
    assert f"needs {package}: pip install 'condlr_ext[demo]'" in message


def test_without_pydantic_only_train_and_its_checkpoints_are_missing():
    code = (
        "import sys; sys.modules['pydantic'] = None; import condlr_ext.experiments.networks;"
        "from condlr_ext.cli import main; assert main(['info', '--json']) == 0; sys.exit(main(['train']))"
    )
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr.splitlines()[-1] == (
        "condlr: error: this command needs pydantic: pip install 'condlr_ext[demo]'"
    )


def test_every_setting_is_an_argument(monkeypatch):
    seen = []
    monkeypatch.setattr("condlr_ext.experiments.study.train", lambda config, progress: seen.append(config) or 1 / 0)
    argv = ["--folder=a", "--network=cnn", "--run=dense", "--run=vanilla:rank=3", "--seed", "3", "4", "--epochs=5"]
    argv += ["--batch_size=6", "--lr=0.1", "--momentum=0", "--weight-decay=1", "--lr-drop=1", "--drop-at", "--no-test"]
    argv += ["--validation=0.5", "--augment", "--adversarial=pgd", "--adversarial-eps=1", "--adversarial-steps=1"]
    argv += ["--eps", "0", "1", "--attacks", "fgsm", "--attack-steps=1", "--attack-restarts=1", "--device=cuda"]
    argv += ["--attack-samples=7", "--jobs=2"]
    assert main(["train", "--data=b.npz", "--tensorboard", "--overwrite", "--out=c", *argv]) == 2
    settings = dict(data="b.npz", folder="a", network="cnn", runs=["dense", "vanilla:rank=3"], seeds=[3, 4], epochs=5)
    settings |= dict(batch_size=6, lr=0.1, momentum=0, weight_decay=1, lr_drop=1, drop_at=(), test=False)
    settings |= dict(validation=0.5, augment=True, adversarial="pgd", adversarial_eps=1, adversarial_steps=1)
    settings |= dict(eps=[0, 1], attacks=["fgsm"], attack_steps=1, attack_restarts=1, device="cuda")
    settings |= dict(attack_samples=7, jobs=2)
    settings |= dict(tensorboard=True, out="c", overwrite=True)
    assert seen == [TrainConfig(**settings)] and settings.keys() == set(TrainConfig.model_fields)


def test_interruption(monkeypatch, capsys):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "train", interrupt)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "condlr: interrupted\n"


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and "--attack-steps" in printed and "default: 0.58 0.83" in printed


def test_the_module_is_the_command():
    argv = [sys.executable, "-m", "condlr_ext", "train", "--run", "nothing"]
    failed = subprocess.run(argv, capture_output=True, text=True)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("condlr: error: run: method must be one of")
