"""Every noun of the command line: its one-line help, and where its commands live. Loading one loads no other."""

from __future__ import annotations

from typing import NamedTuple


class Noun(NamedTuple):
    """`app` is the name of the Typer application inside `module`."""

    help: str
    module: str
    app: str = "app"


NOUNS: dict[str, Noun] = {
    "demo": Noun("The main job on real input: data, training, serving, search, a lab.", "sihe.cli.demo.commands"),
    "up": Noun("Serve the console and the APIs.", "sihe.console.commands"),
    "warmup": Noun("Compile what engines on this processor need, before the first one loads.", "sihe.serving.warmup"),
    "map": Noun("Show the map of topics and what runs behind each.", "sihe.apps.coach.commands", "map_app"),
    "lake": Noun("Tables of the data lake.", "sihe.data.commands", "lake_app"),
    "text": Noun("Files to a tokenised dataset: filter, dedupe, tokenise, pack.", "sihe.data.commands", "text_app"),
    "train": Noun("Train a model, and see its runs.", "sihe.cli.train"),
    "plan": Noun("Predict memory and time of training; search the best plan.", "sihe.cluster.commands"),
    "eval": Noun("Evaluate a model.", "sihe.apps.evaluation.commands"),
    "runs": Noun("Runs with their metrics, of every kind.", "sihe.core.commands", "runs_app"),
    "models": Noun("Registered models, their versions, aliases and lineage.", "sihe.core.commands", "models_app"),
    "predictor": Noun("Predictive models: look at one, register one.", "sihe.serving.predictive.commands"),
    "deploy": Noun("Deployments that serve a model alias.", "sihe.serving.commands"),
    "keys": Noun("Keys, tenants, limits and usage of the server.", "sihe.serving.tenants.commands"),
    "vectors": Noun("Vector collections.", "sihe.vectors.commands"),
    "index": Noun("Build and list search indexes over documents.", "sihe.apps.rag.commands", "index_app"),
    "ask": Noun("Ask an index a question; the answer cites its sources.", "sihe.apps.rag.commands", "ask_app"),
    "lab": Noun("Predict, run and explain a measurement.", "sihe.apps.coach.commands", "lab_app"),
    "coach": Noun("Questions to study, and how far you are.", "sihe.apps.coach.commands", "coach_app"),
    "settings": Noun("The resolved settings and where each comes from.", "sihe.core.commands", "settings_app"),
}
