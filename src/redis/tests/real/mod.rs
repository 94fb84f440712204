//! Against a real server.

use super::*;
use crate::redis::testing::Server;

mod delivery;
mod faults;
mod frames;
mod random;
mod upkeep;
