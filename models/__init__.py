"""The families. To add one: write `models/<name>/__init__.py`, add one line here and its section
in `params.yaml`. The loop, the evaluation and the report do not change."""

from models.base import GenerativeModel
from models.cgan import CGAN
from models.cyclegan import CycleGAN
from models.dcgan import DCGAN
from models.ddpm import DDPM
from models.flow_matching import FlowMatching
from models.gan import GAN
from models.glow import Glow
from models.gmm import GMM
from models.hmm import HMM
from models.inpainting import Inpainting
from models.naive_bayes import NaiveBayes
from models.pix2pix import Pix2Pix
from models.pixelcnn import PixelCNN
from models.pixelrnn import PixelRNN
from models.rbm import RBM
from models.realnvp import RealNVP
from models.srgan import SRGAN
from models.stackgan import StackGAN
from models.stylegan2 import StyleGAN2
from models.transformer import Transformer
from models.vae import VAE
from models.vqvae import VQVAE
from models.wgan import WGAN
from models.wgan_gp import WGANGP

FAMILIES: dict[str, type[GenerativeModel]] = {
    "vae": VAE,
    "dcgan": DCGAN,
    "realnvp": RealNVP,
    "glow": Glow,
    "vqvae": VQVAE,
    "pixelcnn": PixelCNN,
    "pixelrnn": PixelRNN,
    "transformer": Transformer,
    "ddpm": DDPM,
    "flow_matching": FlowMatching,
    "gmm": GMM,
    "naive_bayes": NaiveBayes,
    "rbm": RBM,
    "hmm": HMM,
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
