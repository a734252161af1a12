// The warp of a team of gptq_lanes.h that solves.
#pragma once

#include "gptq_lanes.h"

namespace gptq {

// `Lanes` says how its lanes run and exchange: `each(f)` is f of every lane, `share` gives all lanes of a row its own columns of all of
// them. `ready(panel)` returns when that panel of the factor and the next are in shared memory; `receive(panel)` when another warp has put
// that panel into its slot, which `arrived(panel)` may say at once. `send(unit)` says that the unit's errors are there.
template <int L, class Lanes, class Meet>
ON_LANES void sweep(Lanes& lanes, const Problem& p, const Shared& s, Meet& meet) {
    const int panels = p.panels();
    int panel = 0;
    ROLLED while (panel < panels) {
        lanes.each([&](auto& lane) { lane.renew(p, panel); });
        if (panel < 2) meet.ready(panel);
        // One branch for both: whether there is a next, and whether there is more to do before it.
        bool steady;
        ROLLED do {
            lanes.share();
            lanes.start(p, s, panel);
            const bool more = panel + 1 < panels;
            steady = more && !(p.busy >> (panel + 1) & 1);
            lanes.each([&](auto& lane) { lane.put_unit(panel, 0); });
            meet.send(2 * panel);
            lanes.template go_on<UNIT, Lanes::ARRIVAL - 1>(p);
            const bool there = meet.arrived(panel + 1);
            lanes.template go_on<Lanes::ARRIVAL - 1, Lanes::ARRIVAL>(p);
            // Asked for a column before, so that nothing waits for the answer.
            if (more && !there) meet.receive(panel + 1);
            if (more || L > 1) {
                lanes.each([&](auto& lane) { lane.receive(panel + 1); });
                lanes.template end<true>(p);
            } else {
                lanes.template end<false>(p);
            }
            if (L > 1) together();  // of the last two panels: one's errors go where the row's other lanes read the other
            lanes.each([&](auto& lane) { lane.put_unit(panel, UNIT); });
            meet.send(2 * panel + 1);
            panel++;
        } while (steady);
    }
    lanes.each([&](auto& lane) { lane.finish(p); });
}

}  // namespace gptq
