"""Types of the public names (docs/api.md)."""

from megatron_btx.engine import install as install
from megatron_btx.engine.initializer import initialize as initialize
from megatron_btx.engine.megatron_lm_spec import megatron_lm_spec as megatron_lm_spec
from megatron_btx.engine.model import build_model as build_model
from megatron_btx.engine.model import transformer_config as transformer_config
from megatron_btx.engine.moe.router import BTXRouter as BTXRouter
from megatron_btx.engine.moe.router import forced_routing as forced_routing
from megatron_btx.engine.moe.router_config import transformer_fields as transformer_fields
from megatron_btx.engine.spec import block_spec as block_spec
from megatron_btx.engine.spec import layer_spec as layer_spec
from megatron_btx.errors import UserError as UserError
from megatron_btx.errors import UserErrors as UserErrors
from megatron_btx.families.export import write_hf as write_hf
from megatron_btx.families.open_checkpoint import open_checkpoint as open_checkpoint
from megatron_btx.mix.average import Averaging as Averaging
from megatron_btx.mix.average import average as average
from megatron_btx.mix.btx import btx as btx
from megatron_btx.mix.edit_experts import append as append
from megatron_btx.mix.edit_experts import drop as drop
from megatron_btx.mix.edit_experts import replace_expert as replace_expert
from megatron_btx.mix.plans import mix_plan as mix_plan
from megatron_btx.mix.router_init import RouterInit as RouterInit
from megatron_btx.mix.split import blend as blend
from megatron_btx.mix.split import split as split
from megatron_btx.mix.upcycle import upcycle as upcycle
from megatron_btx.recipe.architecture import Architecture as Architecture
from megatron_btx.recipe.load import load_recipe as load_recipe
from megatron_btx.recipe.load import parse_recipe as parse_recipe
from megatron_btx.recipe.run_plan import plan as plan
from megatron_btx.recipe.schema import Layout as Layout
from megatron_btx.recipe.schema import Mix as Mix
from megatron_btx.recipe.schema import Model as Model
from megatron_btx.recipe.schema import Recipe as Recipe
from megatron_btx.recipe.schema import Routing as Routing
from megatron_btx.recipe.schema import Training as Training
from megatron_btx.weights.plan import Checkpoint as Checkpoint
from megatron_btx.weights.plan import Plan as Plan
from megatron_btx.weights.write_sharded_model import load_into_sharded as load_into_sharded
from megatron_btx.weights.write_torch_dist import write_torch_dist as write_torch_dist

__version__: str
API: dict[str, tuple[str, ...]]
