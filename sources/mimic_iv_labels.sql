-- What the sepsis labels need of MIMIC-IV beyond the tables of mimic_iv.sql, after the rules of mimic-code (MIT licence,
-- commit 8bcbd190ca75, mimic-iv/concepts): the Glasgow coma scale of intubated patients, PaO2/FiO2 of arterial
-- samples, invasive ventilation from the chart, and the hours of a stay.
-- Reads: labevents, chartevents, procedureevents, admissions, diagnoses_icd, icu_stays, visits. Makes: measurements,
-- ventilation; adds columns to icu_stays and visits.

CREATE OR REPLACE TABLE chart AS
SELECT subject_id AS client, hadm_id AS visit_id, stay_id, wall(charttime) AS time, itemid::INTEGER AS item,
       value, try_cast(valuenum AS DOUBLE) AS number
FROM chartevents
WHERE itemid IN ('220045',                                -- heart rate
                 '220052', '220181', '225312',            -- mean pressure: arterial line, cuff, arterial line
                 '223900', '223901', '220739',            -- coma scale: verbal, motor, eyes
                 '223835',                                -- inspired oxygen
                 '226732', '223849', '229314');           -- oxygen device, ventilator mode, mode (Hamilton)

-- The hours in which SOFA is counted: from the first to the last heart rate of the stay.
CREATE OR REPLACE TABLE icu_stays AS
SELECT s.* EXCLUDE (hours_from, hours_to), h.hours_from, h.hours_to
FROM (FROM icu_stays SELECT *, NULL AS hours_from, NULL AS hours_to) s
LEFT JOIN (SELECT stay_id, min(time) AS hours_from, max(time) AS hours_to FROM chart WHERE item = 220045 GROUP BY ALL) h
       USING (stay_id);

-- For the Adult Sepsis Event: where the patient went, and kidney failure that needs dialysis (ICD N18.6, 585.6).
CREATE OR REPLACE TABLE visits AS
SELECT v.*,
       CASE a.discharge_location WHEN 'HOSPICE' THEN 'hospice' WHEN 'ACUTE HOSPITAL' THEN 'acute_care' END AS discharge,
       v.visit_id IN (SELECT hadm_id FROM diagnoses_icd WHERE icd_code IN ('N186', '5856')) AS esrd
FROM visits v LEFT JOIN admissions a ON a.hadm_id = v.visit_id;

-- ------------------------------------------------------------------------------------------ invasive ventilation
-- A status lasts from its first record to the record that follows its last one, or to its last one where nothing follows
-- within 14 h. A pause of 14 h, or another status between, ends it. One single record is no ventilation.

CREATE OR REPLACE TABLE ventilation AS
WITH modes (item, kind, names) AS (VALUES
    (223849, 'invasive', ['(S) CMV', 'APRV', 'APRV/Biphasic+ApnPress', 'APRV/Biphasic+ApnVol', 'APV (cmv)', 'Ambient',
        'Apnea Ventilation', 'CMV', 'CMV/ASSIST', 'CMV/ASSIST/AutoFlow', 'CMV/AutoFlow', 'CPAP/PPS', 'CPAP/PSV',
        'CPAP/PSV+Apn TCPL', 'CPAP/PSV+ApnPres', 'CPAP/PSV+ApnVol', 'MMV', 'MMV/AutoFlow', 'MMV/PSV',
        'MMV/PSV/AutoFlow', 'P-CMV', 'PCV+', 'PCV+/PSV', 'PCV+Assist', 'PRES/AC', 'PRVC/AC', 'PRVC/SIMV', 'PSV/SBT',
        'SIMV', 'SIMV/AutoFlow', 'SIMV/PRES', 'SIMV/PSV', 'SIMV/PSV/AutoFlow', 'SIMV/VOL', 'SYNCHRON MASTER',
        'SYNCHRON SLAVE', 'VOL/AC']),
    (229314, 'invasive', ['APRV', 'APV (cmv)', 'Ambient', '(S) CMV', 'P-CMV', 'SIMV', 'APV (simv)', 'P-SIMV', 'VS', 'ASV']),
    (229314, 'mask', ['DuoPaP', 'NIV', 'NIV-ST']),
    (226732, 'tracheostomy', ['Tracheostomy tube', 'Trach mask']),
    (226732, 'invasive', ['Endotracheal tube']),
    (226732, 'mask', ['Bipap mask', 'CPAP mask']),
    (226732, 'high flow', ['High flow nasal cannula']),
    (226732, 'oxygen', ['Non-rebreather', 'Face tent', 'Aerosol-cool', 'Venti mask', 'Medium conc mask',
        'Ultrasonic neb', 'Vapomist', 'Oxymizer', 'High flow neb', 'Nasal cannula']),
    (226732, 'none', ['None'])
),
-- of what was recorded at one time the strongest counts
states AS (
    SELECT stay_id, any_value(client) AS client, any_value(visit_id) AS visit_id, time,
           arg_min(kind, list_position(['tracheostomy', 'invasive', 'mask', 'high flow', 'oxygen', 'none'], kind)) AS kind
    FROM chart JOIN modes ON modes.item = chart.item AND list_contains(names, trim(value))
    WHERE stay_id IS NOT NULL
    GROUP BY stay_id, time
),
changes AS (
    SELECT *, lead(time) OVER stay AS next,
           kind IS DISTINCT FROM lag(kind) OVER stay
           OR time - lag(time) OVER (PARTITION BY stay_id, kind ORDER BY time) >= INTERVAL 14 HOURS AS is_new
    FROM states
    WINDOW stay AS (PARTITION BY stay_id ORDER BY time)
),
runs AS (SELECT *, sum(is_new::INTEGER) OVER (PARTITION BY stay_id ORDER BY time) AS run FROM changes)
SELECT any_value(client) AS client, any_value(visit_id) AS visit_id, min(time) AS start,
       max(CASE WHEN next - time < INTERVAL 14 HOURS THEN next ELSE time END) AS stop
FROM runs
WHERE kind = 'invasive'
GROUP BY stay_id, run
HAVING min(time) <> max(time);

-- -------------------------------------------------------------------------------------------------- measurements

CREATE OR REPLACE TABLE measurements AS
SELECT subject_id AS client, hadm_id AS visit_id, NULL::VARCHAR AS stay_id, wall(charttime) AS time,
       CASE itemid WHEN '51265' THEN 'platelets' WHEN '50885' THEN 'bilirubin_total' WHEN '50912' THEN 'creatinine'
                   WHEN '50813' THEN 'lactate' END AS concept,
       try_cast(valuenum AS DOUBLE) AS value
FROM labevents
WHERE itemid IN ('51265', '50885', '50912', '50813') AND hadm_id IS NOT NULL AND try_cast(valuenum AS DOUBLE) > 0
  AND NOT (itemid = '50912' AND try_cast(valuenum AS DOUBLE) > 150)
UNION ALL
SELECT client, visit_id, stay_id, time, 'mean_bp', avg(number)
FROM chart
WHERE item IN (220052, 220181, 225312) AND number > 0 AND number < 300
GROUP BY client, visit_id, stay_id, time;

-- Glasgow coma scale. A patient with a tube cannot speak: the total is 15. A missing part has its value of the record
-- before if that is at most 6 h old and was without a tube, and is normal otherwise. Where the chart has lost the text of
-- a verbal score of 1, invasive ventilation (procedure 225792) tells that there was a tube.
INSERT INTO measurements
WITH scores AS (
    SELECT c.client, c.visit_id, c.stay_id, c.time,
           max(number) FILTER (item = 223901) AS motor, max(number) FILTER (item = 220739) AS eyes,
           max(CASE WHEN value = 'No Response-ETT' OR value IS NULL AND number = 1 AND p.stay_id IS NOT NULL THEN 0
                    ELSE number END) FILTER (item = 223900) AS verbal
    FROM chart c
    LEFT JOIN (SELECT DISTINCT c.stay_id, c.time
               FROM chart c JOIN procedureevents p
                 ON p.itemid = '225792' AND p.subject_id = c.client
                AND c.time BETWEEN wall(p.starttime) AND wall(p.endtime)
               WHERE c.item = 223900) p
           ON p.stay_id = c.stay_id AND p.time = c.time
    WHERE item IN (223900, 223901, 220739)
    GROUP BY c.client, c.visit_id, c.stay_id, c.time
),
with_last AS (
    SELECT *, lag(time) OVER stay > time - INTERVAL 6 HOURS AS is_recent, is_recent AND lag(verbal) OVER stay = 0 AS had_tube,
           CASE WHEN is_recent AND lag(verbal) OVER stay IS DISTINCT FROM 0 THEN lag(motor) OVER stay END AS last_motor,
           CASE WHEN is_recent THEN lag(verbal) OVER stay END AS last_verbal,
           CASE WHEN is_recent AND lag(verbal) OVER stay IS DISTINCT FROM 0 THEN lag(eyes) OVER stay END AS last_eyes
    FROM scores
    WINDOW stay AS (PARTITION BY stay_id ORDER BY time)
)
SELECT client, visit_id, stay_id, time, 'gcs',
       CASE WHEN coalesce(verbal, last_verbal) = 0 THEN 15
            ELSE coalesce(motor, last_motor, 6) + coalesce(verbal, last_verbal, 5) + coalesce(eyes, last_eyes, 4) END
FROM with_last;

-- PaO2/FiO2 of arterial samples. The laboratory's own FiO2 comes first, then the last one charted in the 4 h before.
-- FiO2 above 20 is a percentage, up to 1 a fraction; what lies between is a flow in litres. A sample belongs to the
-- patient: many have no admission.
INSERT INTO measurements
WITH samples AS (
    SELECT any_value(subject_id) AS client, max(wall(charttime)) AS time,
           max(value) FILTER (itemid = '52033') AS specimen,
           max(try_cast(valuenum AS DOUBLE)) FILTER (itemid = '50821') AS pao2,
           max(CASE WHEN try_cast(valuenum AS DOUBLE) > 20 AND try_cast(valuenum AS DOUBLE) <= 100
                    THEN try_cast(valuenum AS DOUBLE) / 100
                    WHEN try_cast(valuenum AS DOUBLE) > 0.2 AND try_cast(valuenum AS DOUBLE) <= 1
                    THEN try_cast(valuenum AS DOUBLE) END) FILTER (itemid = '50816') AS fio2
    FROM labevents
    WHERE itemid IN ('52033', '50821', '50816')
    GROUP BY specimen_id
),
charted AS (
    SELECT client, time, max(CASE WHEN number >= 20 THEN number / 100 ELSE number END) AS fio2
    FROM chart
    WHERE item = 223835 AND (number > 0.2 AND number <= 1 OR number >= 20 AND number <= 100)
    GROUP BY client, time
)
SELECT s.client, NULL, NULL, s.time, 'pf_ratio',
       s.pao2 / coalesce(s.fio2, CASE WHEN c.time >= s.time - INTERVAL 4 HOURS THEN c.fio2 END) AS ratio
FROM samples s ASOF LEFT JOIN charted c ON c.client = s.client AND s.time >= c.time
WHERE s.specimen = 'ART.' AND ratio IS NOT NULL;
