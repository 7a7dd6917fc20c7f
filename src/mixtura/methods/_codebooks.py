"""Tables of trellises, by bits of eight weights: by ``python -m mixtura.authoring.codebooks``."""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Int8
from torch import Tensor

# For each rate the standard deviation of weights that a table suits, and its 256 levels as bytes.
_TABLES = {
    8: (
        56.1714,
        "d1c21663ebf02db8eed5452a181933e709e114aac3f12e362fe51bc1f994d71be942a9130423f5f40b8ee3e12eeacc41"
        "f7a0223be8ecd738c9fcb7004fecf002e42324d6e42a0e33b908eaafbf0e0140df2421fcd5a20c27db341c45c2130c4e"
        "0ecd21e0ea52a714942f61e9051deb151a7fd40ad01fe7181066244313d2d8111d12cb032755d3165810f4e8eaceef30"
        "8d2fc8081561dae0e31abb1642f218d649ec14bba7e11cfb76ed1115d62e16e134efdae6323c17c80c4aff06da2f236b"
        "24e5d42e33f8e5ee154f210619c3a4f81cebeb5c16ff9fef4be6dbee22e8abf9b422e9283ae91bcc0de5f64399e959b1"
        "cd0a35bc1ecc51e9ea00e6ebd13c2ec1",
    ),
    12: (
        47.8818,
        "e6b80d4ef5f027bbfcd73a0a121f3bdb0bdf07b8b9f11d3a32d30de0e78ee11eed46a2110b1bcef00a91ccf422f3c64c"
        "ecb00a27ef0ad340c40fcff643f4f611ed1c11d5f541fe3ac80df3c2d909003cce2322f4e6b4fc1bf0301f5fcb120048"
        "0bd733e5e241a410ba2346f8f92ee3121168e80bd11cf51320721c40ffc2e0132e0ad8fa2b7fd709661ef3caceedff26"
        "882cc0fd0839d7f6d80aa53011ed17da51f20bbfa0da2e0355e40724cb2b0eec2bfac5e7114d19ed0a44f61aea283161"
        "1de5bc324210f7e906472ffd1fbbbf001cdfda3f15099ce156f0de0c22e0aaffd322ec1734fb02b719e9fb64afec33bf"
        "d10535c535e55eddef0fe1f1a8292cd4",
    ),
    16: (
        43.3796,
        "14f9b2e1e3f8d17d23a81c47132fd559312b05d0ff56e5c00ef6edbe1033e30a1cf4d69ee2e840bffbcd12340ff118f1"
        "10d155f7ce0cef75cea615f7d4ec0395ed44096634122bfc0108e5d69f0d0425b2d7290d55dbb0efefd1331afac30beb"
        "d4bbfde42101d94381153dbff2e000c9eb4ffece32e9bbe3031c2fd21103222c47182d18fe35f4d8c629fa1bdefbf9d4"
        "e807bd34dc260a0a264dcefb3d079e29f63718f801b618ecdcf4c20f3113db482e101945e91d0cfb20ddf442f62959e0"
        "c4dce4060fd60c30ece4b4ffface2bfd0befe2fd1a014129bf1b0be8d6f431c6590f41239e23f3121d41edecc8613813"
        "baf2de17054f2b1bef02cb1b37b5e007",
    ),
    20: (
        40.0360,
        "1411b9fb00f13bdff42c1805dac11027d1a4c022e9041bf7f71955e902db331efb2b68420de7ba21f6812e14d62a0a0b"
        "e82f16cd01d036ed53b80dd4e8f0d6ffcded29a6ed3ad90f1201dabd25eaf5ba35d80afd0325f4163cdbfb0d151cc396"
        "10cbfa1d2eb50ce1e21a53fc3a60ef2349c6feeedef7c90c1ee9380dab2afed0f701e6d3210ff3b9cde5fe230f0342e8"
        "0b22eeb2c74a96da10581c2f6cf8e707def818e2c725f39fae02e7d5ef09cbf11ff9da081a3b0c2e0131c7f41e0b5638"
        "2c42071747cd16f535af7feaf520d807f50a22e22ae3dd44defee5bcd35207ec4017d6f9e80b290220de00380ee828ce"
        "00e742274e12f1c0df06f03bfec71d16",
    ),
    24: (
        38.7143,
        "02cf13bba8dfeb567e4ae23d0a311d0dfc2fb8e3ccdd1e3eecd94eddfdb708cdf21d992502cd06c60eda2cfbed15fe62"
        "bdd10718e63c0325b6f7ff2581ebc8e310e2d217f42cba092015d0de34af0b1e49e325ee0420f60406130b16c8fbddf3"
        "e25908d03cedf8fd00ed0defdae931dc2902f7fb13c4d5a822c03109df0df701cbf0fa37241747df2f0aff19c2f4d0ff"
        "def1d50995f9b9f7fa051cc5f045e9b137fcea041154d81de525f10afc05e1321a0c41ccf61332e6d43ce0ee1c174c2e"
        "1e0b3be2e5fd27f2d3c218b26325f4eff21d122c3eeae4114824effb33d7150daa3522f5d3091334f2fd6f2918d958c3"
        "09a1e94a240413d314e9c640092b2c1d",
    ),
    28: (
        37.2532,
        "02ca10baabe0ed557c4ee5420a331d0dfc35b4e4c9dc1e3dedd94ed400c608d3f3189a2203d006c20edd37faed13fe63"
        "c7d40717e93c0522b4f7fd2381eec0e611dfce12f52fc0071e17d1e028af0b1b47e72bef0120f80206130b14cdfcd9f5"
        "e45802d33df0f8fc00f00defd9e82ede2902f8fb10c6d9a620b92a04e60df503d5edf538251945e02d09ff16c0f6ceff"
        "dff6d90892f9bff6fc0518b6f345e9a839fbe7051150cf18e227f109fd04df31190e43caf61232e6d735dfeb23194a3e"
        "1f0a35e7e1fd28efcec919bd6021f4f2f121152931eae50d4220f0fc36dd150fb02c1ef7d60a122bf1fd6c2a19d859c3"
        "089fec491c0513d213e8bb390c2c2622",
    ),
    32: (
        36.4898,
        "1ddb2737bd01af05d1f90420f7e62ff12720e8eef73717dafa421051fe08ce2eee18ef095bfbf5f241e4212a4f1c39c1"
        "f443f6e9e1c433d1b807fddccd1564e402f3032a3ed0c50be000ea351223f8dbe07e179c11da0a1c08bfc8f0240113d2"
        "090ed8fb042be6ec261e17e5ecc4050d422ee220d70749251c81d4f6b9fbdd18a807caf40b1ffcba1527df113a51e5f8"
        "1800fc0eea170ffe01352ac7dad3ff1310f90a16f2481f3093153ab52bede9fffbeb1cc9feedd5f8310df1fde2f52522"
        "e81434011b0fdde3eecf560a04af0c05d5c2a946cce40312f4f3b4041bddf16e34cd10d723f5ef3d0eecf818092ebdea"
        "c7e44ae12ea3275de9db08d4f20f1b3d",
    ),
    40: (
        35.0011,
        "e4fdd72150d20bf92cf433e329ca0110daece6084063de17f11e3bb90edc24f209d5c60ff7e004ebd1bdfcd6ed3bcc49"
        "c104cd251cea14b3eff92930162cda360128f655de06ed1e050defdbe910d3d80f0710f7051440fc163cb92b1a263425"
        "22d97e02e1f8fd221acf2dc9bde4c4eff50a13ede6f4b50d4534253e1f171f1bfe441be612f21d2f5c15dd05d1fbf729"
        "38e203f1d8ee4ddb131beb0c0babf0e0fb2d1719c51ae1e3e9812137011e93f5ca0000a5f00c0e131ee607fe9ebf08cf"
        "3018e212f30928e7d6c84aea38212d0a27f6f2fbfa3319c2de220af40843e505aff0e81dfed8f3d50be9f916cb02e903"
        "ec110dce30e6116ef8ddd2e024fffaff",
    ),
    48: (
        34.5376,
        "8104061214d6fdf0f4e5c61ad2bc11f617ee5408ed1c0b22eb0130350b2c7ef31ddefb442729b7f91be11fc4c90e1a15"
        "e0020de4e816231f0018f418f76225e6dcf302d55aebd8dfc2083803162e14fe04c71201e22609d70223e7d03a4c330b"
        "f00da5cdfa1efe1b25d3e59de91928dabaf82017de3cf9ed18fdef3f4836f7e709f0ca1623e6eafff8b03d27f3d8d213"
        "0d08ee1019cd1e4ffbf20ffcf1932bef0f21ec2d321be8c8ee1fdbfafefb1cb437fff131e442cff70512f3e2eac3082a"
        "11f7e3ec2e321639d9d0c00913e8ddf20a14df0c2a0ff6e821dd2d24cff54604cbda100ee6e3051c1eede4ea07ea19dc"
        "ab060006d60bd5be4011036dfdfae1e0",
    ),
}


@cache
def codebook(rate: int) -> tuple[Int8[Tensor, " 256"], float]:
    """Levels of the windows, and the standard deviation of weights that they suit."""
    size, text = _TABLES[rate]
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.int8), size
