"""What the tests of training share: a small set of requests, and short trainings of every arm."""

from training.registry import ARMS

COMMON = {
    "num_steps": 6,
    "learning_rate": 5e-3,
    "warmup_steps": 0,
    "lora_rank": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "batch_size": 2,
    "precision": "float32",
    "reply_tokens": 4,
    "schedule": "constant",
}
OWN = {
    "r2d2": {"pool": 4, "attack_steps": 1, "search_width": 4, "reset_every": 2, "reset_share": 0.5},
    "harc": {"layers": 1, "reestimate_every": 2, "harmless": 2},
}
TRAINED = sorted(name for name, arm in ARMS.all().items() if arm.method)


def behaviours_file(folder):
    """Four pairs and two pseudo-harmful requests to train on, and two pairs for validation."""
    lines = ["behaviour_id,request,label,split,target,pair_id"]
    for i in range(4):
        lines.append(f"bad-{i},Do the bad thing number {i},harmful,train,Sure here is how,{i}")
        lines.append(f"good-{i},Do the good thing number {i},harmless,train,Sure here is how,{i}")
    for i in range(4, 6):
        lines.append(f"bad-{i},Do the bad thing number {i},harmful,validation,Sure,{i}")
        lines.append(f"good-{i},Do the good thing number {i},harmless,validation,Sure,{i}")
    lines += [f"odd-{i},Kill the process number {i},pseudo_harmful,train,," for i in range(2)]
    path = folder / "requests.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def config_of(name, **values):
    """A short training of an arm."""
    settings = {**COMMON, **OWN.get(name, {}), **values}
    settings["checkpoints"] = [c for c in (3, 6) if c <= settings["num_steps"]]
    return ARMS.get(name).make_config(settings, preset="small")
