"""Train GRUs to tell from the letters of a first name whether it is a man's or a woman's.

Names are of any length: a collate function pads them, and batches are made of names of about the same length, so that
there is little to pad. It needs gender-guesser, whose list has 37,000 names of one gender.
"""

import itertools
import random

import torch
from gender_guesser.detector import Detector
from safetensors.torch import load_model
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.utils.data import Dataset

from cerebro_tune import Cerebro, TorchTrainable


class Names(Dataset):
    """A row is (tokens, gender); a letter's token is its number, from 1, since 0 is for padding."""

    def __init__(self, labelled, letters):
        self.names, self.genders = zip(*labelled, strict=True)
        self.tokens = {letter: number for number, letter in enumerate(letters, 1)}

    def __len__(self):
        return len(self.names)

    def __getitem__(self, row):
        return torch.tensor([self.tokens[letter] for letter in self.names[row]]), self.genders[row]


def pad(samples):
    names, genders = zip(*samples, strict=True)
    lengths = torch.tensor([len(name) for name in names])
    return pad_sequence(names, batch_first=True), lengths, torch.tensor(genders)


class Net(nn.Module):
    def __init__(self, letters, hidden):
        super().__init__()
        self.embedding = nn.Embedding(letters + 1, 32, padding_idx=0)
        self.gru = nn.GRU(32, hidden, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, 2)

    def forward(self, names, lengths):
        packed = pack_padded_sequence(self.embedding(names), lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, (forwards, backwards) = self.gru(packed)
        return self.head(torch.cat([forwards, backwards], dim=1))


class Guesser(TorchTrainable):
    def build(self, config, plan):
        model = Net(len(letters), config["hidden"])
        return model, torch.optim.AdamW(model.parameters(), lr=config["lr"])

    def training_step(self, model, batch):  # validation makes val_loss and val_accuracy of these
        names, lengths, genders = batch
        scores = model(names, lengths)
        return {"loss": F.cross_entropy(scores, genders), "accuracy": (scores.argmax(1) == genders).float().mean()}


genders = [["male"], ["female"]]  # names of both, or mostly of one, are left out
known = [(name.lower(), list(said)) for name, said in Detector().names.items()]
labelled = sorted({(name, genders.index(said)) for name, said in known if said in genders})
random.Random(0).shuffle(labelled)
letters = sorted({letter for name, _ in labelled for letter in name})
held_out, validation, train = (Names(part, letters) for part in (labelled[:2000], labelled[2000:4000], labelled[4000:]))


def by_length(rows, batch_size, drop_last):
    """Called for each unit, as torch's BatchSampler is; the rows come in random order."""
    rows = sorted(rows, key=lambda row: len(train.names[row]))
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    random.shuffle(batches)  # or every unit would end with its longest names
    return batches


configs = [{"lr": lr, "hidden": hidden} for lr, hidden in itertools.product([1e-3, 3e-3], [32, 64])]
loader = {"collate_fn": pad, "batch_sampler": by_length}
with Cerebro(train, validation, epochs=3, batch_size=64, workers=2, loader=loader) as cerebro:
    results = cerebro.fit(Guesser, configs, metric="val_accuracy", mode="max")

print(f"\n{'trial':<12}{'val_accuracy':>12}  config")
for result in results.ranked:
    print(f"{result.trial_id:<12}{result.metrics['val_accuracy']:>12.3f}  {result.config}")

best = Net(len(letters), results.best.config["hidden"])
load_model(best, results.best.checkpoint)  # plain PyTorch from here on
names, lengths, truth = pad([held_out[row] for row in range(len(held_out))])
with torch.no_grad():
    accuracy = (best(names, lengths).argmax(1) == truth).float().mean().item()
larger = torch.bincount(truth).max().item() / len(truth)
print(f"\n{results.best.trial_id} has {accuracy:.3f} on {len(truth)} held-out names; the larger class has {larger:.3f}")
assert accuracy >= 0.83, "the best model should be right about 83 % of the names it has never seen"
