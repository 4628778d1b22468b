"""Small networks for the tests: an MLP, a ResNet, a ViT, nn.TransformerEncoder, a GPT with HF's Conv1D."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between, by default 64-256-256-10."""
    widths = widths or (64, 256, 256, 10)
    layers = [layer for m, n in zip(widths, widths[1:], strict=False) for layer in (nn.Linear(m, n), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def tied() -> nn.Sequential:
    """Three linear layers, the first and the last with one weight."""
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 12), nn.Linear(12, 8))
    model[2].weight = model[0].weight
    return model


class Residual(nn.Module):
    """Convolution, batch norm, ReLU, twice, and a 1x1 convolution as shortcut where shapes change."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1, groups: int = 1, dilation: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=dilation, dilation=dilation, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """Images [B, channels, H, W] to classes [B, 10]; its blocks have a plain, a grouped and a dilated convolution."""

    def __init__(self, width: int = 16, channels: int = 3):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.layer1 = Residual(width, width)
        self.layer2 = Residual(width, 2 * width, stride=2, groups=4)
        self.layer3 = Residual(2 * width, 4 * width, stride=2, dilation=2)
        self.fc = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer3(self.layer2(self.layer1(self.stem(x)))).mean((2, 3)))


class FusedAttention(nn.Module):
    """Self-attention with one linear layer for queries, keys and values, as in timm."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-2, -3)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2))


class ViTBlock(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = FusedAttention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Images [B, 3, 16, 16] in patches of 4 to classes [B, 10]."""

    def __init__(self, dim: int = 32, depth: int = 2, heads: int = 4):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 4, stride=4)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 16, dim))
        self.blocks = nn.Sequential(*[ViTBlock(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).mT + self.pos_embed
        return self.head(self.norm(self.blocks(x)).mean(1))


class Encoder(nn.Module):
    """torch's own nn.TransformerEncoder: sequences [B, T, dim] to classes [B, 10]."""

    def __init__(self, dim: int = 32, depth: int = 2, heads: int = 4, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(dim, heads, 2 * dim, dropout=0.0, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, depth)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=padding).mean(1))


class DigitsCNN(nn.Module):
    """Digits [B, 64] to classes [B, 10]: batch norm, a residual, a grouped dilated and a strided convolution."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2, padding_mode="circular")
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.head = nn.Linear(12 * 16, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x.reshape(-1, 1, 8, 8))))
        x = F.relu(x + self.grouped(x))
        return self.head(F.relu(self.down(x)).flatten(1))


def digits_encoder() -> nn.Module:
    """nn.TransformerEncoder over the eight rows of digits [B, 64]."""
    return nn.Sequential(nn.Unflatten(1, (8, 8)), nn.Linear(8, 16), Encoder(16, depth=1, heads=2))


class Conv1D(nn.Module):
    """The linear layer of HF's GPT-2, with the interface it has there: weight [in, out], y = x weight + bias."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(0.02 * torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


class GPTBlock(nn.Module):
    """Names and layers of HF's GPT-2 block."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.ModuleDict({"c_attn": Conv1D(3 * dim, dim), "c_proj": Conv1D(dim, dim)})
        self.mlp = nn.ModuleDict({"c_fc": Conv1D(4 * dim, dim), "c_proj": Conv1D(dim, 4 * dim)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn["c_attn"](self.ln_1(x)).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-2, -3)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-2, -3).flatten(-2)
        x = x + self.attn["c_proj"](y)
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class GPT(nn.Module):
    """Tokens [B, T <= 16] to logits [B, T, vocabulary]; the output layer is tied to the embedding."""

    def __init__(self, vocabulary: int = 40, dim: int = 32, depth: int = 2, heads: int = 4):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, dim), nn.Embedding(16, dim)
        self.h = nn.ModuleList([GPTBlock(dim, heads) for _ in range(depth)])
        self.ln_f = nn.LayerNorm(dim)
        self.lm_head = nn.Linear(dim, vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


MODELS = {"resnet": ResNet, "vit": ViT, "encoder": Encoder, "gpt": GPT}


def example_input(name: str, batch: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    """A random input of the model of MODELS with this name and default sizes."""
    if name == "gpt":
        return torch.randint(0, 40, (batch, 12))
    return torch.randn(batch, 12, 32, dtype=dtype) if name == "encoder" else torch.randn(batch, 3, 16, 16, dtype=dtype)
