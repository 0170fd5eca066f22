"""The families. To add one: write `models/<name>.py`, add one line here and its section in
`params.yaml`. The loop, the evaluation and the report do not change."""

from models.base import GenerativeModel
from models.dcgan import DCGAN
from models.realnvp import RealNVP
from models.vae import VAE

FAMILIES: dict[str, type[GenerativeModel]] = {
    "vae": VAE,
    "dcgan": DCGAN,
    "realnvp": RealNVP,
}
