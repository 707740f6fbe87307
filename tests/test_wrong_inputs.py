"""A hundred things that people get wrong, through the command line: one line that names the value, and no trace.

Each case is a command, words that its one line must hold, and, where the line advises a command or an edit that can be
tried here, the command that follows the advice; it must work.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from latentflow.commands.train import train
from latentflow.data.painting.input_rules import InputRules
from latentflow.model.conditioning import ColumnCondition
from latentflow.sampling.request import SampleRequest
from latentflow.training.settings import to_yaml
from tests import tiny
from tests.data.pictures.stored_files import by_numpy, by_pillow, png16, ramp
from tests.processes import run_here


@dataclass(frozen=True)
class Wrong:
    """A wrong command.

    Attributes:
        command: what is typed after `latentflow`; {w} is the folder of the world's files, {out} one that is not there.
        said: words of the line.
        advised: what following the advice comes to, if that is a command; it must succeed.
    """

    command: str
    said: tuple[str, ...]
    advised: str = ""


def wrong(command: str, *said: str, advised: str = "") -> Wrong:
    return Wrong(command, said, advised)


ENCODE = "encode {w}/photos --autoencoder {w}/kl --image-size 16 --out {out}"
TRAIN = "train {w}/recipe.yaml data.path={w}/cache autoencoder={w}/kl out={out}"
SAMPLE = "sample {w}/model --num 2 --steps 2 --solver euler --out {out}"
SCAN = SAMPLE.replace("model", "scans")
INPAINT = "inpaint {w}/painter {w}/photo.png {w}/hole.png --steps 2 --out {out}/filled.png"
PAINT = "mask-to-image {w}/painter {w}/map.png --steps 2 --out {out}/painted.png"
TRANSLATE = "translate {w}/sharpener {w}/photo.png --steps 2 --out {out}/large.png"
EVALUATE = "evaluate {w}/model --data {w}/photos --features random --metrics fid --num 12 --steps 2 --out {out}"
DISTILL = (
    "distill {w}/model --data {w}/cache out={out} training.steps=1 training.batch_size=4 training.precision=fp32 "
    "--device cpu"
)
TUNE = (
    "finetune {w}/model --data {w}/cache out={out} training.steps=1 training.batch_size=4 training.precision=fp32 "
    "--device cpu"
)
FEW = "sample {w}/student --num 2 --out {out}"
JUDGE = "train-features {w}/photos --image-size 16 --out {out}"

CASES = {
    "verbs and options": [
        wrong("smaple {w}/model --out {out}", "smaple", "sample"),
        wrong("sample {w}/model --outt {out}", "--outt", "--out"),
        wrong("sample {w}/model", "--out"),
        wrong("sample --out {out}", "MODEL"),
        wrong("sample {w}/model --num two --out {out}", "--num", "two"),
        wrong("sample {w}/model --num 0 --out {out}", "0", advised=SAMPLE),
        wrong("sample {w}/model --num -3 --out {out}", "-3"),
        wrong("sample {w}/model --batch-size 0 --out {out}", "0"),
        wrong(SAMPLE.replace("{out}", "''"), "--out", "empty", advised=SAMPLE),
        wrong(SAMPLE.replace("{w}/model", "''"), "MODEL", "empty"),
        wrong(
            SAMPLE + " --guided-channels 5", "--guided-channels 5", advised=SAMPLE + " --guidance 2 --guided-channels 4"
        ),
        wrong(SAMPLE + " --rtol 1e-3", "--rtol 0.001"),
        wrong(SAMPLE + " --guidance-interval 0.8,0.1", "--guidance-interval", "0.8"),
        wrong(SAMPLE + " --json=yes", "--json", "latentflow sample --help"),
        wrong(SAMPLE + " --device toaster", "toaster", advised=SAMPLE + " --device cpu"),
        wrong(SAMPLE + " --device cuda:99", "cuda:99", advised=SAMPLE + " --device cpu"),
    ],
    "students": [
        wrong(
            "sample {w}/model --num 2 --evaluations 4 --out {out}",
            *("--evaluations 4", "no student", "--solver ab2 --steps 4", "latentflow distill"),
            advised="sample {w}/model --num 2 --solver ab2 --steps 4 --out {out}",
        ),
        wrong(SAMPLE.replace("euler", "jumps"), "--solver jumps", "use heun", advised=SAMPLE.replace("euler", "heun")),
        wrong(FEW + " --evaluations 0", "--evaluations 0", "from 1 to 16", advised=FEW + " --evaluations 1"),
        wrong(FEW + " --evaluations 17", "--evaluations 17", "from 1 to 16", advised=FEW + " --evaluations 16"),
        wrong(FEW + " --evaluations 2 --steps 2", "--evaluations 2", "leave one out", advised=FEW + " --evaluations 2"),
        wrong(FEW + " --guidance 9", "--guidance 9", "from 1 to 8", advised=FEW + " --guidance 2"),
        wrong(FEW + " --guidance 0.5", "--guidance 0.5", "from 1 to 8", advised=FEW + " --guidance 1"),
        wrong(FEW + " --guidance 2 --guide {w}/painter", "--guide", "leave it out", advised=FEW + " --guidance 2"),
        wrong(FEW + " --guidance 2 --guidance-interval 0.1,0.8", "--guidance-interval 0.1,0.8", "leave it out"),
        wrong("invert {w}/student {w}/photo.png --evaluations 4 --out {out}", "--evaluations 4", "--solver heun"),
        wrong(DISTILL.replace("model", "student"), "student", "is a student itself", "give its teacher"),
        wrong(DISTILL.replace("model", "nowhere"), "nowhere"),
        wrong("distill {w}/model out={out} --device cpu", "data.path is not set", advised=DISTILL),
        wrong(DISTILL.replace("{w}/cache", "{w}/nowhere"), "nowhere"),
        wrong(DISTILL.replace("model", "painter"), "map classes", "give data of"),
        wrong(DISTILL.replace("size=4", "size=3"), "jumps.every = 2", "3 images", advised=DISTILL),
        wrong(DISTILL + " jumps.last_share=0.5", "last_share = 0.5", "first_share = 0.1", "swap the two"),
        wrong(DISTILL + " jumps.evry=2", "jumps.evry", "every", advised=DISTILL + " jumps.every=2"),
        wrong(DISTILL + " training.align_weight=1", "align_weight", "leave it out"),
        wrong(DISTILL + " sampling.guidance=9", "sampling.guidance", "8"),
        wrong(DISTILL + " --recipe studnet", "studnet", "student", advised=DISTILL + " --recipe student"),
    ],
    "finetuning": [
        wrong(TUNE.replace("model", "nowhere"), "nowhere"),
        wrong(TUNE.replace("model", "photos"), "photos is not a model folder", "velocity.safetensors"),
        wrong(TUNE.replace("model", "student"), "is a student of", "finetune that model", advised=TUNE),
        wrong(TUNE.replace("model", "huge"), "config.json"),
        wrong(TUNE.replace("model", "truncated"), "velocity.safetensors"),
        wrong(TUNE.replace("{w}/cache", "{w}/nowhere"), "nowhere"),
        wrong(TUNE.replace(" --data {w}/cache", ""), "--data"),
        wrong(TUNE.replace("{out}", "{w}/model"), "lies inside", "choose another place"),
        wrong(TUNE + " --method bitfit", "--method", "bitfit", "biases", advised=TUNE + " --method biases"),
        wrong(TUNE + " --rank 0", "--rank", "0", advised=TUNE + " --rank 1"),
        wrong(TUNE + " --rank 4 --method full", "--rank 4", "--method lora", advised=TUNE + " --rank 4 --method lora"),
        wrong(TUNE + " --class-from corgi", "--class-from 'corgi'", "NEW=OLD"),
        wrong(TUNE + " --class-from apple=fig", "no class 'fig'", advised=TUNE + " --class-from apple=berry"),
        wrong(TUNE + " --class-from appel=berry", "'appel'", "apple", advised=TUNE + " --class-from apple=berry"),
        wrong(TUNE + " --class-from apple=berry --class-from apple=apple", "apple is given twice"),
        wrong(TUNE + " normalise=per_channel", "normalise", "leave it out", advised=TUNE),
        wrong(TUNE + " path.kind=cosine", "path", "leave path out", advised=TUNE),
        wrong(TUNE + " network.name=DiT-S/2", "DiT-S/2", "leave network out", advised=TUNE),
        wrong(TUNE + " autoencoder=shapes", "hash", "--autoencoder"),
        wrong(TUNE + " --method biases training.ema_lengths=0.1", "ema_lengths", "leave it out"),
        wrong(TUNE + " init_from={w}/painter", "init_from", "keep one"),
        wrong(TUNE.replace("model", "painter"), "conditioning.semantic_map"),
        wrong(
            TUNE.replace("model", "painter") + " conditioning.inpainting=false conditioning.semantic_map=false", "mask"
        ),
        wrong(TRAIN + " finetuning.method=lora", "init_from is not set", "add init_from=MODEL"),
        wrong("train finetune data.path={w}/cache out={out}", "init_from is not set", "add init_from=MODEL"),
    ],
    "pixels": [
        wrong(ENCODE + " --pixels rgbx", "--pixels 'rgbx'", "bands", advised=ENCODE + " --pixels rgb"),
        wrong(ENCODE + " --depth 12", "--depth", "12", advised=ENCODE + " --depth 16"),
        wrong(ENCODE + " --value-range 9,3", "--value-range '9,3'", "0,4095", advised=ENCODE + " --value-range 3,200"),
        wrong(ENCODE.replace("photos", "depths"), "a.png", "b.png", "8 bits", "--depth 16", "--depth 8"),
        wrong(
            ENCODE.replace("photos", "depths"), "--depth", advised=ENCODE.replace("photos", "depths") + " --depth 16"
        ),
        wrong(ENCODE.replace("photos", "depths"), "--depth", advised=ENCODE.replace("photos", "depths") + " --depth 8"),
        wrong(
            ENCODE.replace("photos", "bands"),
            "4 channels",
            "--pixels rgb",
            "train-autoencoder",
            advised=ENCODE.replace("photos", "bands") + " --pixels rgb",
        ),
        wrong(ENCODE.replace("photos", "counts"), "a.npy has 4 channels", "b.npy 5"),
        wrong(
            ENCODE.replace("photos", "kinds"),
            "a.png is gray",
            "b.png has colours",
            "--pixels rgb",
            advised=ENCODE.replace("photos", "kinds") + " --pixels rgb",
        ),
        wrong(ENCODE.replace("photos", "not_a_number"), "a.npy", "64 of its 64 numbers are NaN"),
        wrong(ENCODE.replace("photos", "constant"), "all 7", "--value-range"),
        wrong(ENCODE.replace("photos", "empty_tiff"), "a.tif", "0 bytes"),
        wrong(ENCODE.replace("photos", "complex"), "a.npy", "complex128", "uint16"),
        wrong(TRAIN + " data.pixels=gray", "data.pixels = gray", "8-bit rgb", advised=TRAIN),
    ],
    "encode": [
        wrong(ENCODE.replace("photos", "photoss"), "photoss"),
        wrong(ENCODE.replace("photos", "empty"), "empty"),
        wrong(ENCODE.replace("photos", "photo.png"), "photo.png"),
        wrong(ENCODE.replace("photos", "text.txt"), "text.txt"),
        wrong(ENCODE.replace("photos", "text.zip"), "text.zip"),
        wrong(ENCODE.replace("photos", "mixed"), "mixed"),
        wrong(ENCODE + " --label-column kind", "photos", "--label-column", advised=ENCODE),
        wrong(
            ENCODE.replace("photos", "tabled") + " --label-column knd",
            "'knd'",
            "'kind'",
            advised=ENCODE.replace("photos", "tabled/labels.csv") + " --label-column kind",
        ),
        wrong(ENCODE.replace("photos", "tabled") + " --columns age:nubmer", "--columns", "nubmer", "number"),
        wrong(ENCODE.replace("photos", "tabled") + " --columns kind:number", "line 2", "'red'", "the kind label"),
        wrong(ENCODE.replace("photos", "tabled") + " --file-column nme", "'nme'", "file, kind, age"),
        wrong(
            ENCODE.replace("photos", "lonely_row/labels.csv"),
            "gone.png",
            "line 8",
            "--allow-missing",
            advised=ENCODE.replace("photos", "lonely_row/labels.csv") + " --allow-missing",
        ),
        wrong(
            ENCODE.replace("photos", "lonely_image/labels.csv"),
            "extra.png",
            "--allow-missing",
            advised=ENCODE.replace("photos", "lonely_image/labels.csv") + " --allow-missing",
        ),
        wrong(ENCODE.replace("photos", "splits"), "splits", "train", advised=ENCODE.replace("photos", "splits/train")),
        wrong(ENCODE.replace("photos", "coco"), "train2017", advised=ENCODE.replace("photos", "coco/train2017")),
        wrong(ENCODE.replace("photos", "unreadable"), "unreadable"),
        wrong(ENCODE.replace("photos", "one_class_broken") + " --strict", "berry"),
        wrong(ENCODE.replace("photos", "eps"), "picture.jpg"),
        wrong(ENCODE.replace("photos", "lonely_map"), "b.png"),
        wrong(ENCODE.replace("photos", "lonely_input"), "apple/0.png", "zero.jpg"),
        wrong(ENCODE.replace("photos", "more_than_pairs"), "inputs/", "more"),
        wrong(ENCODE.replace("photos", "stretched") + " --strict", "30 x 10", "24 x 20", "aspect"),
        wrong(ENCODE.replace("photos", "banded_inputs"), "inputs/apple/0.npy", "4", "6", "--input-pixels"),
        wrong(ENCODE.replace("photos", "pairs") + " --input-pixels grey", "--input-pixels", "grey", "gray"),
        wrong(ENCODE + " --inputs shrnk:4", "--inputs", "shrnk:4", "shrink:N", advised=ENCODE + " --inputs shrink:4"),
        wrong(ENCODE + " --inputs shrink:3", "shrink:3", "15", advised=ENCODE + " --inputs shrink:2"),
        wrong(ENCODE.replace("16", "18") + " --inputs shrink:3 --input-form pixels", "shrink:3", "2, 4", "latents"),
        wrong(ENCODE + " --input-form latents", "--input-form", "no paired inputs", "--inputs"),
        wrong(ENCODE.replace("photos", "no_classes"), "classes.json"),
        wrong(ENCODE.replace("photos", "bad_classes"), "classes.json"),
        wrong(ENCODE.replace("{w}/photos", "synthetic:many"), "synthetic:many"),
        wrong(ENCODE.replace("{w}/photos", "synthetic:0"), "0"),
        wrong(ENCODE.replace("16", "15"), "15", advised=ENCODE),
        wrong(ENCODE.replace("16", "0"), "0"),
        wrong(ENCODE.replace("16", "-16"), "-16"),
        wrong(ENCODE.replace("16", "1000000"), "1000000"),
        wrong(ENCODE + f" --mask-variants {10**20}", "--mask-variants", "1,000"),
        wrong(ENCODE + " --variants 101", "--variants", "100"),
        wrong(ENCODE + " --variants 4 --mask-variants 2", "--variants 4", "2", advised=ENCODE + " --variants 1"),
        wrong(ENCODE + " --first 99", "99", "18", advised=ENCODE + " --first 18"),
        wrong(ENCODE + " --first 0", "0"),
        wrong(ENCODE + " --dry-run --look 4", "--look 4", "--dry-run", advised=ENCODE + " --dry-run"),
        wrong(ENCODE.replace("photos", "unreadable") + " --dry-run", "unreadable", "a web page"),
        wrong(ENCODE.replace("photos", "no.parquet"), "no.parquet"),
        wrong(ENCODE.replace("photos", "text.tar"), "text.tar", "tar archive"),
        wrong(ENCODE.replace("{w}/photos", "'{w}/shards-{{00..04}}.tar'"), "shards-00.tar", "not there"),
        wrong(ENCODE + " --mask-variants 2 --mask-folder {w}/empty", "empty"),
        wrong(ENCODE + " --mask-variants 2 --mask-folder {w}/nowhere", "nowhere"),
        wrong(ENCODE.replace("kl", "klll"), "klll"),
        wrong(ENCODE.replace("kl", "photos"), "photos"),
        wrong(ENCODE.replace("kl", "text.txt"), "text.txt"),
        wrong(ENCODE.replace("kl", "decoder_only"), "decoder_only"),
        wrong(ENCODE.replace("{out}", "{w}/photos/cache"), "photos"),
        wrong(ENCODE.replace("{out}", "{w}/text.txt"), "text.txt"),
        wrong(ENCODE.replace("{out}", "{w}/flat"), "flat"),
    ],
    "train": [
        wrong(TRAIN.replace("recipe", "recipee"), "recipee"),
        wrong("train own_imagez data.path={w}/cache out={out}", "own_imagez", "own_images"),
        wrong(TRAIN.replace("recipe.yaml", "list.yaml"), "list"),
        wrong(TRAIN.replace("recipe.yaml", "twice.yaml"), "twice", "optimizer"),
        wrong(TRAIN.replace("recipe.yaml", "bomb.yaml"), "bomb"),
        wrong(TRAIN.replace("recipe.yaml", "latin.yaml"), "latin"),
        wrong(TRAIN.replace("recipe.yaml", "photo.png"), "photo.png"),
        wrong(TRAIN + " training.step=4", "training.step", "steps", advised=TRAIN + " training.steps=1"),
        wrong(TRAIN + " trainning.steps=4", "trainning", "training"),
        wrong(TRAIN + " training.steps", "training.steps"),
        wrong(TRAIN + " training.steps=0", "0"),
        wrong(TRAIN + " training.steps=4.5", "4.5"),
        wrong(TRAIN + " training.steps=1:30", "1:30"),
        wrong(TRAIN + " training.steps=ten", "ten"),
        wrong(TRAIN + " training.steps=1 training.steps=2", "training.steps"),
        wrong(TRAIN + " training.batch_size=-1", "-1"),
        wrong(TRAIN + " training.precision=fp8", "fp8"),
        wrong(TRAIN + " training.keep_at=[0.5,2]", "keep_at", "2"),
        wrong(TRAIN + " sampling.guide=3", "guide", "3"),
        wrong(TRAIN + " data.held_out=0.9", "data.held_out", "0.9", "0 for none"),
        wrong(TRAIN + " data.held_out=some", "data.held_out", "some", "auto"),
        wrong(TRAIN + " optimizer.learning_rate=nan", "nan"),
        wrong(TRAIN + " optimizer.learning_rate=-1", "-1"),
        wrong(TRAIN + " optimizer.betas=0.9", "0.9"),
        wrong(TRAIN + " optimizer.kind=moun", "moun"),
        wrong(TRAIN + " optimizer.kind=muon optimizer.momentum=1", "momentum", "1"),
        wrong(TRAIN + " optimizer.kind=muon optimizer.orthogonalise_every=0", "orthogonalise_every", "0"),
        wrong(
            TRAIN + " optimizer.orthogonalise_every=2",
            "orthogonalise_every = 2",
            "optimizer.kind=muon",
            advised=TRAIN + " training.steps=1 optimizer.orthogonalise_every=2 optimizer.kind=muon",
        ),
        wrong("train-autoencoder shapes data.path={w}/photos out={out} optimizer.kind=muon", "muon", "adamw"),
        wrong(TRAIN + " network.depth=1000000", "1000000"),
        wrong(TRAIN + " network.hidden_size=33", "33"),
        wrong(TRAIN + " network.patch_size=3", "patch_size"),
        wrong(TRAIN + " network.depth=1 network.value_residual=true", "depth is 1", "value_residual=false"),
        wrong(TRAIN + " training.align_weight=1 training.align_block=7", "align_block = 7", "1 to 2", advised=TRAIN),
        wrong(TRAIN + " training.align_weight=-1", "align_weight", "-1"),
        wrong(
            TRAIN + " 'network={{kind: unet, channels: 8, multipliers: [1], norm_groups: 4}}' training.align_weight=1",
            "align_weight = 1",
            "network.kind=dit",
        ),
        wrong(TRAIN + " network.kind=unet network.value_residual=true", "value_residual"),
        wrong(TRAIN + " data.image_size=32", "32", "16", advised=TRAIN),
        wrong(TRAIN + " data.image_size=1000000000", "1000000000"),
        wrong(TRAIN + " conditioning.label_dropout=2", "2"),
        wrong(TRAIN + " conditioning.semantic_map=true", "semantic_map"),
        wrong(TRAIN + " data.augment=0.5", "data.augment", "--variants 4", advised=TRAIN + " data.augment=0"),
        wrong(TRAIN + " data.augment=1", "data.augment", "1"),
        wrong(TRAIN + " sampling.solver=huen", "huen", "heun"),
        wrong(TRAIN.replace("cache", "cachee"), "cachee"),
        wrong(TRAIN.replace("data.path={w}/cache ", ""), "data.path"),
        wrong(TRAIN.replace("/kl", "/other_kl"), "other_kl", advised=TRAIN + " training.steps=1"),
        wrong(TRAIN.replace("out={out}", "out={w}/text.txt"), "text.txt"),
        wrong(TRAIN.replace("{w}/cache", "{w}/photos").replace("{out}", "{w}/photos/run"), "photos"),
    ],
    "sample": [
        wrong(SAMPLE.replace("w}/model", "w}/modell"), "modell"),
        wrong(SAMPLE.replace("w}/model", "w}/photos"), "photos"),
        wrong(SAMPLE.replace("w}/model", "w}/text.txt"), "text.txt"),
        wrong(SAMPLE.replace("w}/model", "w}/truncated"), "velocity.safetensors"),
        wrong(SAMPLE.replace("w}/model", "w}/flipped"), "velocity.safetensors"),
        wrong(SAMPLE.replace("w}/model", "w}/nan"), "velocity.safetensors"),
        wrong(SAMPLE.replace("w}/model", "w}/huge"), "config.json"),
        wrong(SAMPLE + " --classes aple", "aple", "apple", advised=SAMPLE + " --classes apple"),
        wrong(SAMPLE + " --classes 1", "1", "#1", advised=SAMPLE + " --classes '#1'"),
        wrong(SAMPLE + " --classes '#3'", "3"),
        wrong(SAMPLE + " --classes '#-1'", "-1"),
        wrong(SAMPLE + " --classes 'apple,#1'", "#1"),
        wrong(SAMPLE + " --guidance -1", "-1"),
        wrong(SAMPLE + " --guidance nan", "nan"),
        wrong(SAMPLE + " --guidance 1e30", "1e+30"),
        wrong(SAMPLE + " --guidance 2 --guidance-interval 0.8,0.1", "0.8"),
        wrong(SAMPLE + " --guidance 2 --guidance-interval low,high", "low,high"),
        wrong(SAMPLE + " --guidance 2 --guided-by colour", "colour"),
        wrong(SAMPLE + " --guidance 2 --guided-by semantic_map", "semantic_map"),
        wrong(SAMPLE.replace("model", "unconditional") + " --guidance 2", "guidance"),
        wrong(SAMPLE + " --guidance 2 --guide {w}/modell", "modell"),
        wrong(SAMPLE + " --guidance 2 --guide {w}/model", "--guide", "itself", "--guided-by label"),
        wrong(SAMPLE + " --guidance 2 --guide @1/8", "--guide @1/8", "RUN@1/8"),
        wrong(SAMPLE + " --guidance 2 --guide ''", "--guide", "@1/8"),
        wrong(
            SAMPLE + " --guide {w}/unconditional",
            *("--guide", "unconditional", "guidance is 1"),
            advised=SAMPLE + " --guide {w}/unconditional --guidance 1.5",
        ),
        wrong(SAMPLE.replace("w}/model", "w}/model@1/8"), "model@1/8", "recipe.yaml"),
        wrong(SAMPLE + " --adapter {w}/nowhere", "nowhere", "does not exist"),
        wrong(SAMPLE + " --adapter {w}/empty", "empty", "adapter_config.json", "--method lora"),
        wrong(SAMPLE + " --adapter {w}/foreign", "foreign", "is missing", "--method lora"),
        wrong(SAMPLE + " --adapter {w}/text.txt", "text.txt", "a folder"),
        wrong(SAMPLE + " --adapter ''", "--adapter", "the folder of an adapter"),
        wrong(SAMPLE.replace("model", "scans") + " --adapter {w}/tuned", "tuned", "an adapter of", "scans"),
        wrong(SAMPLE.replace("model", "tuned/adapter"), "tuned/adapter", "--adapter"),
        wrong(
            SAMPLE + " --adapter {w}/tuned --adapter {w}/tuned/adapter",
            *("--adapter is given twice", "tuned/adapter"),
            advised=SAMPLE + " --adapter {w}/tuned/adapter",
        ),
        wrong(
            SAMPLE + " --adapter-strength 0.5",
            *("--adapter-strength 0.5", "without an adapter"),
            advised=SAMPLE + " --adapter {w}/tuned --adapter-strength 0.5",
        ),
        wrong(SAMPLE + " --adapter {w}/tuned --adapter-strength nan", "--adapter-strength nan", "from 0 to 10"),
        wrong(SAMPLE + " --adapter {w}/tuned --adapter-strength -1", "--adapter-strength -1", "from 0 to 10"),
        wrong(SAMPLE + " --adapter {w}/tuned --adapter-strength half", "--adapter-strength 'half'", "0.7"),
        wrong(
            "merge {w}/model --out {out}", "add --adapter", advised="merge {w}/model --adapter {w}/tuned --out {out}"
        ),
        wrong("merge {w}/model --adapter {w}/tuned --out {w}/kl", "kl is not empty"),
        wrong(SAMPLE.replace("w}/model", "w}/model@last"), "model@last", "model@1/8"),
        wrong(SAMPLE.replace("model", "unconditional") + " --classes apple", "apple"),
        wrong(SAMPLE.replace("euler", "huen"), "huen", "heun", advised=SAMPLE.replace("euler", "heun")),
        wrong(SAMPLE.replace("euler", "dopri5"), "dopri5", "steps"),
        wrong(SAMPLE + " --rtol 1e-3", "rtol"),
        wrong(SAMPLE.replace("--steps 2", "--steps 0"), "0"),
        wrong(SAMPLE.replace("--steps 2", "--steps 1000000000"), "1000000000"),
        wrong(SAMPLE + " --shift 0", "0"),
        wrong(SAMPLE + " --seed -1", "-1"),
        wrong(SAMPLE.replace("{out}", "{w}/flat"), "flat"),
        wrong(SAMPLE.replace("{out}", "{w}/samples_of_another"), "samples_of_another"),
        wrong("sample {w}/painter --num 1 --out {out} --classes pear", "pear"),
        wrong(SCAN + " --condition agee=63", "agee", "age", advised=SCAN + " --condition age=63"),
        wrong(SCAN + " --condition age", "--condition", "age", "age=63"),
        wrong(SCAN + " --condition age=old", "age=old", "number", advised=SCAN + " --condition age=50"),
        wrong(SCAN + " --condition age=inf", "age=inf", "finite"),
        wrong(SCAN + " --condition view=latral", "latral", "lateral", advised=SCAN + " --condition view=lateral"),
        wrong(SCAN + " --condition tags=edema,x", "tags=edema,x", "'x'", "edema, nodule"),
        wrong(SCAN + " --condition age=1 --condition age=2", "age=2", "twice"),
        wrong(SCAN + " --condition label=apple", "label", "--classes"),
        wrong(SCAN + " --condition age=63 --guidance 2 --guided-by view", "view", "not given"),
        wrong(SCAN.replace("scans", "model") + " --condition age=63", "age", "no named conditions"),
        wrong("vary {w}/scans --condition age=20,60 --out {out}", "age=20,60", "one value"),
        wrong(EVALUATE.replace("{w}/model", "{w}/scans"), "no table", "view, tags, age", "--labels balanced"),
        wrong(TRAIN + " conditioning.columns=age", "conditioning.columns", "no column 'age'", "they have none"),
    ],
    "paint": [
        wrong(INPAINT.replace("photo.png", "nothing.png"), "nothing.png"),
        wrong(INPAINT.replace("photo.png", "text.txt"), "text.txt"),
        wrong(INPAINT.replace("photo.png", "fifo.png"), "fifo.png"),
        wrong(INPAINT.replace("photo.png", "eps/picture.jpg"), "picture.jpg"),
        wrong(INPAINT.replace("hole.png", "black.png"), "black.png"),
        wrong(INPAINT.replace("hole.png", "white.png"), "white.png"),
        wrong(INPAINT.replace("hole.png", "hole_small.png"), "hole_small.png"),
        wrong(INPAINT.replace("hole.png", "hole_gray.png"), "hole_gray.png"),
        wrong(INPAINT + " --feather -1", "-1"),
        wrong(INPAINT + " --fit stretched", "stretched", "window", advised=INPAINT + " --fit window"),
        wrong(INPAINT + " --method magic", "magic"),
        wrong(INPAINT.replace("painter", "model") + " --method condition", "condition"),
        wrong(INPAINT.replace("{out}/filled.png", "{w}/photo.png"), "photo.png"),
        wrong(INPAINT.replace("filled.png", "filled.jpg"), "filled.jpg", advised=INPAINT),
        wrong(PAINT.replace("painter", "model"), "semantic_map"),
        wrong(PAINT.replace("map.png", "map_strange.png"), "map_strange.png"),
        wrong(PAINT.replace("map.png", "map.jpg"), "map.jpg"),
        wrong(PAINT.replace("map.png", "map_unknown.png"), "map_unknown.png", "3"),
        wrong("image-to-image {w}/model {w}/photo.png --strength 0 --out {out}/a.png", "0"),
        wrong("image-to-image {w}/model {w}/photo.png --strength 1.5 --out {out}/a.png", "1.5"),
        wrong("interpolate {w}/model --seeds 1 --out {out}", "1"),
        wrong("interpolate {w}/model --seeds 1,2 --num 1 --out {out}", "1"),
        wrong("vary {w}/model --amount 2 --out {out}", "2"),
        wrong("invert {w}/model {w}/nothing.png --out {out}", "nothing.png"),
        wrong(TRANSLATE.replace("sharpener", "model"), "the condition input", "label"),
        wrong(TRANSLATE.replace("photo.png", "nothing.png"), "nothing.png"),
        wrong(TRANSLATE.replace("photo.png", "text.txt"), "text.txt"),
        wrong(TRANSLATE.replace("photo.png", "map_odd.png") + " --native", "21 x 17", "20 x 16", advised=TRANSLATE),
        wrong(TRANSLATE + " --guided-by semantic_map --guidance 2", "semantic_map"),
    ],
    "measure and convert": [
        wrong(EVALUATE.replace("w}/photos", "w}/nowhere"), "nowhere"),
        wrong(EVALUATE.replace("fid", "fidd"), "fidd", "fid"),
        wrong(EVALUATE.replace("random", "vgg"), "vgg", "random"),
        wrong(EVALUATE.replace("random", "{w}/photos"), "--features", "photos", "judge.json", "train-features"),
        wrong(EVALUATE.replace("model", "unconditional").replace("fid", "class-accuracy"), "class-accuracy", "classes"),
        wrong(EVALUATE.replace("fid", "class-accuracy") + " --labels none", "class-accuracy", "--labels none"),
        wrong(JUDGE.replace("photos", "photoss"), "photoss"),
        wrong(JUDGE, "18", "250"),
        wrong(JUDGE.replace("photos", "cache"), "latent cache"),
        wrong(JUDGE + " --width 12", "--width", "12", "8"),
        wrong(JUDGE + " --side 8", "--side", "8", "16"),
        wrong(JUDGE + " --batch-size 1", "--batch-size", "1"),
        wrong(JUDGE.replace("{out}", "{w}/photos/judge"), "photos"),
        wrong(JUDGE.replace("{w}/photos", "synthetic:260").replace("{out}", "{w}/flat"), "flat"),
        wrong(EVALUATE.replace("--num 12", "--num 1"), "1"),
        wrong(EVALUATE + " --task draw", "task", "draw"),
        wrong(EVALUATE + " --labels some", "some"),
        wrong(EVALUATE + " --task translate", "the condition input"),
        wrong(EVALUATE.replace("w}/model", "w}/sharpener") + " --task translate", "photos", "no paired inputs"),
        wrong(EVALUATE + " --against {w}/text.txt", "text.txt"),
        wrong(EVALUATE.replace("w}/model", "w}/mixed_samples"), "mixed_samples"),
        wrong("loss {w}/model --data {w}/photos --num 0", "0"),
        wrong("sweep {w}/model --data {w}/photos --solvers eulerr --out {out}", "eulerr", "euler"),
        wrong("sweep {w}/model --data {w}/photos --steps four --out {out}", "four"),
        wrong("ema {w}/run --length 0.3 --out {out}", "0.3", "0.28", advised="ema {w}/run --length 0.1 --out {out}"),
        wrong("ema {w}/run --length 0.25 --out {out}", "--length 0.25", "give 0.0"),
        wrong("ema {w}/run --length 0.1 --step 5 --out {out}", "--step 5", "the nearest is 4"),
        wrong("ema {w}/run --length 0.1", "--out", "--write"),
        wrong("ema {w}/run --length 0.1 --write --out {out}", "--out", "--write"),
        wrong("ema {w}/run --length 0.1 --out {w}/kl", "kl is not empty"),
        wrong("ema {w}/model --length 0.1 --out {out}", "has kept no averages", "training.ema_lengths"),
        wrong("ema me/nothing --length 0.1 --out {out}", "me/nothing"),
        wrong(f"{TRAIN} 'training.ema_lengths=[0.05, 0.5]'", "training.ema_lengths", "0.5"),
        wrong(f"{TRAIN} 'training.ema_lengths=[0.05, 0.05]'", "training.ema_lengths", "once"),
        wrong(f"{TRAIN} training.ema_snapshots=0", "training.ema_snapshots", "0"),
        wrong("sweep {w}/run --data {w}/photos --ema 0.5 --out {out}", "--ema 0.5", "0.28"),
        wrong("sweep {w}/run --data {w}/photos --ema 0.05,0.27 --out {out}", "--ema 0.27", "give 0.0"),
        wrong("sweep {w}/model --data {w}/photos --ema 0.05 --out {out}", "has kept no averages"),
        wrong("sweep {w}/run --data {w}/photos --ema a,b --out {out}", "--ema 'a,b'"),
        wrong("benchmark {w}/model --batch-sizes 0", "0"),
        wrong("info {w}/empty", "empty"),
        wrong("convert lfmm {w}/text.txt --out {out}", "lfmm", "lfm"),
        wrong("convert sit {w}/text.txt --autoencoder {w}/kl --out {out} name=SiT-S/2", "text.txt"),
        wrong("convert sit {w}/nothing.pth --autoencoder {w}/kl --out {out}", "nothing.pth"),
        wrong("export {w}/nothing --out {out}", "nothing"),
        wrong("push {w}/model ../../etc", "../../etc"),
        wrong("prepare camvidd {w}/scenes --out {out}", "camvidd", "camvid"),
        wrong("prepare camvid {w}/photos --out {out}", "photos"),
    ],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, kl, kl_folder, cache) -> Path:
    """The files that the commands speak of. No case may change any of them."""
    w = tmp_path_factory.mktemp("world")
    shutil.copytree(kl_folder, w / "kl")
    tiny.kl(seed=7).save_pretrained(w / "other_kl")
    shutil.copytree(cache, w / "cache")
    _data(w)
    _pictures(w)
    _recipes(w)
    _models(w, kl)
    kept = {"steps": 4, "ema_lengths": [0.05, 0.1], "ema_snapshots": 2}
    train(tiny.recipe(data={"path": cache}, autoencoder=kl_folder, training=kept, out=w / "run"), runtime=tiny.CPU)
    return w


def _data(w: Path) -> None:
    tiny.write_images(w / "photos")
    tiny.write_images(w / "flat", classes=())
    tiny.write_segmented(w / "scenes")
    (w / "empty").mkdir()
    (w / "text.txt").write_text("neither an image nor a model", encoding="utf-8")
    for name in ("text.zip", "text.tar", "no.parquet"):
        (w / name).write_text("no archive", encoding="utf-8")
    for split in ("train", "val"):
        tiny.write_images(w / "splits" / split, per_class=2)
    for split in ("train2017", "val2017"):
        tiny.write_images(w / "coco" / split, classes=())
    shutil.copytree(w / "flat", w / "mixed")
    shutil.copytree(w / "photos" / "apple", w / "mixed" / "apple")
    tiny.write_images(w / "unreadable", classes=())
    for file in (w / "unreadable").iterdir():
        file.write_text("<html>404</html>", encoding="utf-8")
    shutil.copytree(w / "photos", w / "one_class_broken")
    for file in (w / "one_class_broken" / "berry").iterdir():
        file.write_bytes(b"")
    rows = [
        f"{file.name},{kind}," for file, kind in zip(sorted((w / "flat").iterdir()), 3 * ["red", "blue"], strict=True)
    ]
    for name, more in (("tabled", []), ("lonely_row", ["gone.png,red,"]), ("lonely_image", [])):
        shutil.copytree(w / "flat", w / name)
        (w / name / "labels.csv").write_text("\n".join(["file,kind,age", *rows, *more]), encoding="utf-8")
    shutil.copy(w / "flat" / "0.png", w / "lonely_image" / "extra.png")
    _pixels(w)
    (w / "eps").mkdir()
    (w / "eps" / "picture.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    )
    shutil.copytree(w / "scenes", w / "lonely_map")
    shutil.copy(next((w / "scenes" / "masks").rglob("*.png")), w / "lonely_map" / "masks" / "b.png")
    for name in ("pairs", "lonely_input", "more_than_pairs", "stretched"):
        tiny.write_paired(w / name)
    (w / "lonely_input" / "inputs" / "apple" / "0.jpg").rename(w / "lonely_input" / "inputs" / "apple" / "zero.jpg")
    shutil.copytree(w / "flat", w / "more_than_pairs" / "more")
    Image.new("RGB", (30, 10)).save(w / "stretched" / "inputs" / "apple" / "0.jpg")
    tiny.write_images(w / "banded_inputs" / "images", per_class=1)
    for channels, name in enumerate(tiny.CLASSES, start=4):
        (w / "banded_inputs" / "inputs" / name).mkdir(parents=True)
        np.save(w / "banded_inputs" / "inputs" / name / "0.npy", np.zeros((10, 12, channels), np.uint8))
    shutil.copytree(w / "scenes", w / "no_classes")
    (w / "no_classes" / "classes.json").unlink()
    shutil.copytree(w / "scenes", w / "bad_classes")
    (w / "bad_classes" / "classes.json").write_text('{"names": ["sky", "sky", 3]}', encoding="utf-8")


def _pixels(w: Path) -> None:
    """Folders of other pixels than 8-bit colours; names end in the format."""
    deep, shallow = ramp(1, "uint16", 4095), ramp(1, "uint8")
    files = {
        "depths/a.png": by_pillow(shallow, "PNG"),
        "depths/b.png": png16(deep),
        "bands/a.npy": by_numpy(ramp(4, "uint16")),
        "counts/a.npy": by_numpy(ramp(4, "uint8")),
        "counts/b.npy": by_numpy(ramp(5, "uint8")),
        "kinds/a.png": png16(deep),
        "kinds/b.png": png16(ramp(3, "uint16")),
        "not_a_number/a.npy": by_numpy(np.full((8, 8), np.nan, np.float32)),
        "constant/a.png": png16(np.full((8, 8, 1), 7, np.uint16)),
        "empty_tiff/a.tif": b"",
        "complex/a.npy": by_numpy(np.zeros((8, 8), complex)),
    }
    for name, content in files.items():
        (w / name).parent.mkdir(exist_ok=True)
        (w / name).write_bytes(content)


def _pictures(w: Path) -> None:
    photo = Image.open(w / "photos" / "apple" / "0.png").convert("RGB")
    photo.save(w / "photo.png")
    size = photo.size
    hole = Image.new("L", size)
    ImageDraw.Draw(hole).rectangle((6, 6, 12, 12), fill=255)
    hole.save(w / "hole.png")
    hole.resize((size[0] // 2, size[1] // 2), Image.Resampling.NEAREST).save(w / "hole_small.png")
    Image.new("L", size, 100).save(w / "hole_gray.png")
    Image.new("L", size).save(w / "black.png")
    Image.new("L", size, 255).save(w / "white.png")
    classes = Image.fromarray((np.arange(size[0] * size[1]).reshape(size[::-1]) % 3).astype(np.uint8))
    classes.save(w / "map.png")
    classes.save(w / "map.jpg")
    classes.point(lambda value: value * 3 + 3).save(w / "map_unknown.png")
    Image.new("RGB", size, (1, 2, 3)).save(w / "map_strange.png")
    Image.new("RGB", (21, 17), (1, 2, 3)).save(w / "map_odd.png")
    os.mkfifo(w / "fifo.png")


def _recipes(w: Path) -> None:
    (w / "recipe.yaml").write_text(to_yaml(tiny.recipe()), encoding="utf-8")
    (w / "list.yaml").write_text("- steps\n- 10\n", encoding="utf-8")
    twice = "optimizer: {learning_rate: 1e-3}\ntraining: {steps: 10}\noptimizer: {weight_decay: 0.01}\n"
    (w / "twice.yaml").write_text(twice, encoding="utf-8")
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    (w / "bomb.yaml").write_text("\n".join(levels), encoding="utf-8")
    (w / "latin.yaml").write_bytes("description: caf\xe9".encode("latin-1"))


def _models(w: Path, kl) -> None:
    model = tiny.model(kl)
    model.save_pretrained(w / "model")
    tiny.student(model, seed=1).save_pretrained(w / "student")
    tiny.finetuned(w / "model").save_pretrained(w / "tuned")
    (w / "foreign").mkdir()
    (w / "foreign" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}', encoding="utf-8")
    tiny.model(kl, class_names=()).save_pretrained(w / "unconditional")
    tiny.model(kl, conditioning=tiny.SPATIAL).save_pretrained(w / "painter")
    tiny.model(kl, inputs=InputRules()).save_pretrained(w / "sharpener")
    columns = [
        ColumnCondition(name="view", kind="label", class_names=["frontal", "lateral"]),
        ColumnCondition(name="tags", kind="labels", class_names=["edema", "nodule"]),
        ColumnCondition(name="age", kind="number", mean=50, deviation=20, low=18, high=95),
    ]
    tiny.model(kl, conditioning={"columns": columns}).save_pretrained(w / "scans")
    for name in ("truncated", "flipped", "nan", "huge"):
        shutil.copytree(w / "model", w / name)
    weights = (w / "model" / "velocity.safetensors").read_bytes()
    (w / "truncated" / "velocity.safetensors").write_bytes(weights[:-8])
    flipped = bytearray(weights)
    flipped[-6] ^= 64
    (w / "flipped" / "velocity.safetensors").write_bytes(flipped)
    broken = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    next(iter(broken.values())).view(-1)[0] = float("nan")
    model.save_pretrained(w / "nan", weights=broken)
    config = json.loads((w / "huge" / "config.json").read_text(encoding="utf-8"))
    config["network"]["hidden_size"] = 2_000_000_000
    (w / "huge" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    partial = tiny.kl().state_dict()
    from safetensors.torch import save_file

    shutil.copytree(w / "kl", w / "decoder_only")
    kept = {name: tensor.contiguous() for name, tensor in partial.items() if name.startswith("decoder")}
    save_file(kept, w / "decoder_only" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def drawn(world) -> Path:
    """Pictures of two models, one folder each and one of both."""
    from latentflow.commands.sample import sample

    request = SampleRequest(num=2, steps=1, solver="euler")
    sample(str(world / "unconditional"), request, world / "samples_of_another")
    sample(str(world / "model"), request, world / "mixed_samples")
    for file in (world / "samples_of_another").glob("*.png"):
        shutil.copy(file, world / "mixed_samples" / f"another-{file.name}")
    return world


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{kind}: {case.command[:90]}") for kind, cases in CASES.items() for case in cases]
)
def test_wrong_input_costs_one_line(case, drawn, tmp_path, capsys, monkeypatch):
    """Exit code 2, one line with the value, nothing written anywhere; and the advice works."""
    monkeypatch.chdir(tmp_path)
    before = _snapshot(drawn)
    result = _run(case.command, drawn, tmp_path, capsys, monkeypatch)
    assert result.code == 2, result
    line = result.error
    assert line.startswith("latentflow: "), line
    for words in case.said:
        assert words in line
    assert len(line) < 700
    assert _snapshot(drawn) == before
    assert list(tmp_path.iterdir()) == []
    if case.advised:
        assert _run(case.advised, drawn, tmp_path, capsys, monkeypatch).code == 0


def test_there_are_a_hundred():
    assert sum(map(len, CASES.values())) >= 100


def _run(command: str, world: Path, tmp_path: Path, capsys, monkeypatch):
    args = [part.format(w=world, out=tmp_path / "out") for part in shlex.split(command)]
    return run_here(args, capsys, monkeypatch)


def _snapshot(folder: Path) -> dict[str, object]:
    """Every path below `folder`, of files with what changes when they are written.

    A lock may come into a folder and go again.
    """
    paths = sorted(folder.rglob("*"))
    return {str(p): None if p.is_dir() else (p.lstat().st_size, p.lstat().st_mtime_ns) for p in paths}
