"""The families. To add one: write `models/<name>.py`, add one line here and its section in
`params.yaml`. The loop, the evaluation and the report do not change."""

from models.base import GenerativeModel
from models.cgan import CGAN
from models.cyclegan import CycleGAN
from models.dcgan import DCGAN
from models.gan import GAN
from models.inpainting import Inpainting
from models.pix2pix import Pix2Pix
from models.realnvp import RealNVP
from models.srgan import SRGAN
from models.stackgan import StackGAN
from models.stylegan2 import StyleGAN2
from models.vae import VAE
from models.wgan import WGAN
from models.wgan_gp import WGANGP

FAMILIES: dict[str, type[GenerativeModel]] = {
    "vae": VAE,
    "dcgan": DCGAN,
    "realnvp": RealNVP,
    "gan": GAN,
    "wgan": WGAN,
    "wgan_gp": WGANGP,
    "cgan": CGAN,
    "stackgan": StackGAN,
    "pix2pix": Pix2Pix,
    "srgan": SRGAN,
    "inpainting": Inpainting,
    "cyclegan": CycleGAN,
    "stylegan2": StyleGAN2,
}
